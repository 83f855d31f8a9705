"""The sweeps draw what they say, and differences between samplers have their sign."""

from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from benchmarks.tinyworld import sweeps
from benchmarks.tinyworld.sweeps import FRACTION, SWEEPS
from engine.train.ico import SCHEMES


class _Bench:
    """Remembers what is drawn; a picture is the number of steps."""

    sd, noun, concept = None, "cat", "striped-cat"

    def __init__(self) -> None:
        self.drawn: list[tuple[str, Any]] = []
        self.learned: list[tuple[int, int, int]] = []

    def infusion(self) -> engine.Concept:
        return engine.Concept("cat", {"layer": torch.zeros(2)})

    def ico(self, sizes: tuple[int, int, int] = (1, 1, 3)) -> engine.Concept:
        self.learned.append(sizes)
        return engine.Concept("cat", tokens=torch.zeros(1, 2))

    def draw(self, phrase: str, customization: Any, **changes: Any) -> list[int]:
        self.drawn.append((phrase, customization))
        return [changes.get("guidance_scale", changes.get("steps", 20))]

    def covers(self, images: list[int]) -> list[int]:
        return images

    def values(self, images: list[int], silhouettes: list[int] | None = None) -> dict[str, list[float]]:
        return {"layout": [float(images[0])], "against": [float(0 if silhouettes is None else silhouettes[0])]}

    def estimate(self, values: list[float]) -> float:
        return values[0]

    def estimates(self, images: list[int], silhouettes: list[int] | None = None) -> dict[str, Any]:
        return {"drawn": images, "against": silhouettes}


@pytest.fixture
def bench() -> _Bench:
    return _Bench()


def _records(name: str, bench: Any) -> list[dict[str, Any]]:
    return list(SWEEPS[name](bench))


def test_strengths(bench: _Bench) -> None:
    values = [record["value"] for record in _records("strength", bench)]
    assert [custom.strength for _, custom in bench.drawn] == values == list(sweeps.STRENGTHS)
    assert {phrase for phrase, _ in bench.drawn} == {"cat"}


def test_guidance_is_compared_with_its_own_base(bench: _Bench) -> None:
    for record in _records("guidance", bench):
        assert record["drawn"] == record["against"] == [record["value"]]
    assert [custom is None for _, custom in bench.drawn[:4]] == [True, False, True, False]


def test_dcis_knobs_and_parts(bench: _Bench) -> None:
    records = _records("dci", bench)
    assert {phrase for phrase, _ in bench.drawn} == {"V* cat"}
    assert isinstance(bench.drawn[0][1], engine.ICO)
    for record, (_, custom) in zip(records[1:], bench.drawn[1:], strict=True):
        swept = record["sweep"]
        assert custom.strength == (record["value"] if swept == "lambda" else 1.0)
        assert custom.fraction == (record["value"] if swept == "fraction" else FRACTION)
        off = (not custom.masked, custom.separate_prompts, custom.last_layer_only)
        parts = ("no masks", "separate prompts", "last layer only")
        assert off == tuple(swept == "ablation" and record["value"] == part for part in parts)


def test_every_prompt_scheme_is_learned(bench: _Bench) -> None:
    records = _records("scheme", bench)
    assert tuple(bench.learned) == sweeps.PROMPT_SCHEMES == tuple(tuple(record["value"]) for record in records)


def test_samplers_are_compared_each_with_its_own_base(bench: _Bench) -> None:
    for record in _records("sampler", bench):
        assert record["difference"]["layout"] == 50 - 20
        assert record["both"] == {"layout": [20, 50], "against": [0, 50]}


def test_concepts_are_learned_once_in_their_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sweeps.TUNED_ICO, "steps", 1)
    monkeypatch.setattr(sweeps.Prompted, "__init__", lambda *_: None)
    bench, before = sweeps.SweepBench("striped-cat", 1, tmp_path, tmp_path / "learned"), SCHEMES["dci"]
    bench.sd, bench.concept, bench.noun = engine.load(), "striped-cat", "cat"
    for sizes in ((0, 0, 2), (4, 2, 1)):
        tokens = bench.ico(sizes).tokens
        assert tokens is not None
        assert len(tokens) == sizes[2]
    assert SCHEMES["dci"] == before
    monkeypatch.setattr(engine, "train_ico", None)
    assert bench.ico((4, 2, 1)).tokens is not None
