"""Which requests take the next step: a pure function of the queue.

Time is shared between clients in proportion to the rows that were stepped for them (start-time fair queueing, Goyal et
al. 1996): the client that has had least goes first, and within a client the request that came first. What is left of
the row budget is filled in the same order with requests whose rows fit and share a batch. The first in that order is
always taken, and every step that it is passed over would raise the others' share alone, so nobody starves.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """A request that could take a step.

    Attributes:
        client: whose it is.
        key: rows of like keys may share a batch.
        rows: of the UNet at its next step.
    """

    client: str
    key: Hashable
    rows: int


def choose(
    candidates: Sequence[Candidate], served: Mapping[str, float], max_rows: Callable[[Hashable], int]
) -> list[int]:
    """The candidates, by index, that take the next step together.

    Args:
        candidates: in the order in which they came.
        served: rows stepped for each of their clients; see ``catch_up``.
        max_rows: how many rows one batch of a key should have; the first chosen may have more, and is alone then.

    Returns:
        At least one where there are any.
    """
    queues: dict[str, list[int]] = {}
    for i, one in enumerate(candidates):
        queues.setdefault(one.client, []).append(i)
    share = {client: served[client] for client in queues}
    chosen: list[int] = []
    key: Hashable = None
    room = 0
    while queues:
        client = min(queues, key=lambda one: (share[one], queues[one][0]))
        i = queues[client].pop(0)
        one = candidates[i]
        if not chosen:
            key, room = one.key, max(one.rows, max_rows(one.key))
        if one.key == key and one.rows <= room:
            chosen.append(i)
            room -= one.rows
            share[client] += one.rows
        if not queues[client]:
            del queues[client]
        if not room:
            break
    return chosen


def catch_up(served: Mapping[str, float], client: str, present: Sequence[str]) -> float:
    """What a client that comes, or comes back, counts as served: no less than those present that have had least.

    Time in which it asked for nothing is not made up for.
    """
    return max(served.get(client, 0.0), min((served[one] for one in present), default=0.0))
