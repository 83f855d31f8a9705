"""The layout study: its bench tells layout by size, and a run goes on where it was stopped."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.tinyworld import layout_study, prompted
from benchmarks.tinyworld.bench import DRAWING
from benchmarks.tinyworld.layout_study import BOUNDS, METHOD, LayoutBench, Task, run
from benchmarks.tinyworld.look_judge import LookJudge
from benchmarks.tinyworld.prompted import Prompted
from engine.evaluate.tinyworld import load_evaluator


@pytest.fixture(scope="module")
def bench() -> LayoutBench:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DRAWING, "steps", 1)
        patch.setattr(prompted, "look_judge", lambda _folder: LookJudge(load_evaluator()).requires_grad_(False))
        return LayoutBench("striped-cat", 2, Path("nowhere"))


def test_a_prompts_seeds_stand_in_a_row(bench: LayoutBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DRAWING, "steps", 1)
    assert len(bench.asked) == 24
    assert bench.asked[0] is bench.asked[1] is not bench.asked[2]
    assert bench.numbers == [0, 1] * 12
    assert bench.texts("V* cat")[2] == bench.asked[2].text.format("V* cat")
    plain = Prompted.base_images(bench)
    for mine, theirs in zip(bench.foundations.images, plain, strict=True):
        assert max(abs(a - b) for a, b in zip(mine.tobytes(), theirs.tobytes(), strict=True)) <= 1


def test_layout_is_told_by_the_size_of_the_foundations_object(bench: LayoutBench) -> None:
    own = bench.measure(bench.foundations.images)
    assert own["layout"]["mean"] == 1
    assert (own["small"], own["large"]) == ({"layout": 1, "growth": 1},) * 2
    areas = bench.silhouettes.flatten(1).mean(dim=1)
    halves = bench._halves()
    assert sorted(halves["small"] + halves["large"]) == list(range(24))
    assert areas[halves["small"]].max() <= areas[halves["large"]].min()
    twice = bench._by_size(2 * bench.silhouettes)
    assert twice["small"] == {"layout": 0.5, "growth": 2.0}


def test_values_are_grouped_by_prompt(bench: LayoutBench) -> None:
    values = [float(i // 2 == 0) for i in range(24)]
    record: Any = bench.estimate(values)
    assert record["mean"] == pytest.approx(1 / 12, abs=1e-4)
    assert record["interval"][1] >= 3 / 12  # of 12 prompts, not of 24 pictures


def test_bounds_are_other_seeds_and_one_scene_twice(bench: LayoutBench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setitem(DRAWING, "steps", 1)
    inner = bench.draw
    monkeypatch.setattr(bench, "draw", lambda *given: seen.append(given) or inner(*given))
    bounds = bench.bounds()
    assert seen == [("cat", [None], 1000)]
    assert bounds["judge"]["layout"]["n"] == 10
    assert 0 < bounds["chance"]["layout"]["mean"] <= 1
    mass = bench.map_mass()
    assert set(mass) == {"16", "8", "4", "2"}
    assert mass["16"]["small"]["area"] == mass["2"]["small"]["area"] <= mass["2"]["large"]["area"]


def test_a_run_draws_what_is_left(bench: LayoutBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(layout_study, "_bench", lambda *_: bench)
    monkeypatch.setattr(layout_study, "train", lambda *_: [])
    monkeypatch.setattr(bench.foundations, "draw", lambda _p, how, _s: drawn.append(how) or bench.foundations.images)
    ask = lambda *names: run(Task("striped-cat", METHOD, names, 2), tmp_path, tmp_path)  # noqa: E731
    ask(METHOD)
    records = ask(METHOD, "map squared")
    assert drawn == [layout_study.INTERVENTIONS[METHOD], layout_study.INTERVENTIONS["map squared"]]
    assert [record["drawing"] for record in records] == [METHOD, "map squared"]
    assert len(list((tmp_path / "sheets").iterdir())) == 2
    assert Task("a", BOUNDS, (), 2).name != Task("a", METHOD, (), 2).name
