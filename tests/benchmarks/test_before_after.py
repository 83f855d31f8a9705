"""Two commits in turns: each side's own engine, and their times kept apart."""

from pathlib import Path

import pytest

from benchmarks import before_after


def test_sides_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def measure(folder: Path, _dtype: str, repeats: int) -> dict[str, list[float]]:
        order.append(folder.name)
        return {"generate_1": [len(order) / 1000] * repeats}

    monkeypatch.setattr(before_after, "measure", measure)
    records = before_after.take_turns({"before": Path("a"), "after": Path("b")}, "float32", rounds=3, repeats=2)
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert {one["side"]: one["median_ms"] for one in records} == {"before": 3.0, "after": 4.0}


def test_each_side_runs_its_own_engine(tmp_path: Path) -> None:
    (tmp_path / "engine.py").write_text(
        "class Engine:\n    def generate(self, prompts, **_):\n        return prompts\n"
        "def load(dtype):\n    print('noise')\n    return Engine()\n"
    )
    times = before_after.measure(tmp_path, "float32", repeats=3)
    assert {case: len(each) for case, each in times.items()} == {"load": 1, "generate_1": 3, "generate_4": 3}
    assert all(0 <= one < 1 for each in times.values() for one in each)
