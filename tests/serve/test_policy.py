"""The policy as a pure function: budgets are kept, nobody starves, clients share."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.serving.simulate import Arrival, poisson, simulate
from engine.serve.policy import Candidate, catch_up, choose

_CANDIDATES = st.lists(
    st.builds(Candidate, client=st.sampled_from("abc"), key=st.sampled_from("xy"), rows=st.integers(1, 8)), max_size=12
)


@given(_CANDIDATES, st.integers(1, 16), st.lists(st.integers(0, 100), min_size=3, max_size=3))
def test_batches_fit_and_go_by_share_and_order(candidates: list[Candidate], budget: int, had: list[int]) -> None:
    served = dict(zip("abc", map(float, had), strict=True))
    chosen = choose(candidates, served, lambda _: budget)
    assert bool(chosen) == bool(candidates)
    if not chosen:
        return
    batch = [candidates[i] for i in chosen]
    assert len(set(chosen)) == len(chosen)
    assert len({one.key for one in batch}) == 1
    assert len(batch) == 1 or sum(one.rows for one in batch) <= budget
    first = min(range(len(candidates)), key=lambda i: (served[candidates[i].client], i))
    assert chosen[0] == first, "the client that has had least goes first, with its first request"
    for client in "abc":
        own = [i for i in chosen if candidates[i].client == client]
        assert own == sorted(own), "within a client first come, first served"
    room = budget - sum(one.rows for one in batch)
    left = [one for i, one in enumerate(candidates) if i not in chosen and one.key == batch[0].key]
    assert not any(one.rows <= room for one in left), "nothing that fits is left behind"


def test_clients_fill_a_batch_in_turns() -> None:
    many = [Candidate("a", 0, 2)] * 6 + [Candidate("b", 0, 2)] * 2
    assert choose(many, {"a": 0.0, "b": 0.0}, lambda _: 8) == [0, 6, 1, 7]
    assert choose(many, {"a": 9.0, "b": 0.0}, lambda _: 4) == [6, 7]
    assert choose(many, {"a": 0.0, "b": 3.0}, lambda _: 4) == [0, 1]


def test_what_is_larger_than_a_batch_goes_alone() -> None:
    assert choose([Candidate("a", 0, 20), Candidate("a", 0, 2)], {"a": 0.0}, lambda _: 8) == [0]
    assert choose([Candidate("a", 0, 6), Candidate("a", 0, 20), Candidate("a", 0, 2)], {"a": 0.0}, lambda _: 8) == [
        0,
        2,
    ]


def test_each_key_has_a_budget_of_its_own() -> None:
    both = [Candidate("a", "small", 2)] * 4 + [Candidate("a", "large", 2)] * 4
    budgets = {"small": 6, "large": 2}
    assert choose(both, {"a": 0.0}, budgets.__getitem__) == [0, 1, 2]
    assert choose(both[4:], {"a": 0.0}, budgets.__getitem__) == [0]


def test_who_was_away_does_not_make_up_for_it() -> None:
    assert catch_up({"a": 0.0, "b": 2.0}, "new", ["a", "b"]) == 0.0
    assert catch_up({"a": 40.0, "b": 70.0}, "new", ["a", "b"]) == 40.0
    assert catch_up({"a": 40.0, "new": 55.0}, "new", ["a"]) == 55.0
    assert catch_up({"new": 5.0}, "new", []) == 5.0


@pytest.mark.parametrize("load", [0.5, 0.9])
def test_every_arrival_is_served_and_waits_are_bounded(load: float) -> None:
    waits = simulate(poisson(3000, load=load, max_rows=16, seed=1), max_rows=16)
    assert len(waits) == 3000
    assert max(waits) < (200 if load == 0.5 else 1000), "steps that the unluckiest waited for its first"
    assert sum(waits) / len(waits) < (1.5 if load == 0.5 else 40), "half a step of which is until the next begins"


def test_a_client_that_floods_delays_itself() -> None:
    flood = [Arrival(0, "flood", 2, 20)] * 500
    others = [Arrival(40 * i, "other", 2, 20) for i in range(40)]
    waits = simulate(sorted([*flood, *others], key=lambda one: one.step), max_rows=8)
    by_client = Counter[str]()
    for arrival, wait in zip(sorted([*flood, *others], key=lambda one: one.step), waits, strict=True):
        by_client[arrival.client] = max(by_client[arrival.client], int(wait))
    assert by_client["other"] <= 2
    assert by_client["flood"] > 1000


def test_a_large_request_among_small_ones_gets_its_turn() -> None:
    small = [Arrival(i // 4, "a", 2, 8) for i in range(2000)]
    arrivals = sorted([*small, Arrival(100, "b", 30, 8)], key=lambda one: one.step)
    waits = simulate(arrivals, max_rows=16)
    assert waits[arrivals.index(Arrival(100, "b", 30, 8))] <= 20
