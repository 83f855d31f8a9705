"""The sweeps draw what they say, and differences between samplers have their sign."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import engine
from benchmarks.tinyworld import sweeps
from benchmarks.tinyworld.sweeps import FRACTION, SWEEPS
from engine.train.ico import SCHEMES


class _Bench:
    """Remembers what is drawn; a picture is the number of steps or the guidance, a foundation's 1 more."""

    noun, numbers = "cat", [0, 1]

    def __init__(self) -> None:
        self.drawn: list[tuple[str, Any]] = []
        self.learned: list[tuple[int, int, int]] = []

    def infusion(self) -> engine.Concept:
        return engine.Concept("cat", {"layer": torch.zeros(2)})

    def ico(self, sizes: tuple[int, int, int] = (1, 1, 3)) -> engine.Concept:
        self.learned.append(sizes)
        return engine.Concept("cat", tokens=torch.zeros(1, 2))

    def draw(self, phrase: str, customizations: list[Any], **changes: Any) -> SimpleNamespace:
        self.drawn += [(phrase, custom) for custom in customizations]
        told = changes.get("steps", changes.get("guidance_scale", 20))
        images = [told + i for i in range(len(customizations)) for _ in self.numbers]
        return SimpleNamespace(images=images, foundation_images=[-told] * len(images))

    def covers(self, images: list[int]) -> list[int]:
        return images

    def values(self, images: list[int], silhouettes: list[int]) -> dict[str, list[float]]:
        return {"layout": [float(images[0])], "against": [float(silhouettes[0])]}

    def estimate(self, values: list[float]) -> float:
        return values[0]

    def estimates(self, images: list[int], silhouettes: list[int] | None = None) -> dict[str, Any]:
        return {"drawn": images, "against": silhouettes}


@pytest.fixture
def bench() -> _Bench:
    return _Bench()


def _records(name: str, bench: Any) -> list[dict[str, Any]]:
    return list(SWEEPS[name](bench))


def test_strengths_share_their_foundations(bench: _Bench) -> None:
    records = _records("strength", bench)
    assert [custom.strength for _, custom in bench.drawn] == list(sweeps.STRENGTHS)
    assert {phrase for phrase, _ in bench.drawn} == {"cat"}
    for i, (record, value) in enumerate(zip(records, sweeps.STRENGTHS, strict=True)):
        assert (record["value"], record["drawn"], record["against"]) == (value, [20 + i] * 2, [-20, -20])


def test_guidance_is_compared_with_its_own_base(bench: _Bench) -> None:
    for record in _records("guidance", bench):
        assert record["drawn"] == [record["value"]] * 2 == [-one for one in record["against"]]


def test_dcis_knobs_and_parts(bench: _Bench) -> None:
    records = _records("dci", bench)
    assert {phrase for phrase, _ in bench.drawn} == {"V* cat"}
    assert isinstance(bench.drawn[0][1], engine.ICO)
    settings = {json.dumps(custom.settings()): custom for _, custom in bench.drawn[1:]}
    assert len(settings) == len(bench.drawn) - 1  # what sweeps have in common is drawn once
    wanted = {"lambda": sweeps.LAMBDAS, "fraction": sweeps.FRACTIONS}
    for sweep, values in wanted.items():
        assert [one["value"] for one in records if one["sweep"] == sweep] == list(values)
    kinds = {
        (one.strength, one.fraction, one.masked, one.separate_prompts, one.last_layer_only) for one in settings.values()
    }
    expected = {(value, FRACTION, True, False, False) for value in sweeps.LAMBDAS}
    expected |= {(1.0, value, True, False, False) for value in sweeps.FRACTIONS}
    expected |= {
        (1.0, FRACTION, False, False, False),
        (1.0, FRACTION, True, True, False),
        (1.0, FRACTION, True, False, True),
    }
    assert kinds == expected


def test_every_prompt_scheme_is_learned(bench: _Bench) -> None:
    records = _records("scheme", bench)
    assert tuple(bench.learned) == sweeps.PROMPT_SCHEMES == tuple(tuple(record["value"]) for record in records)


def test_samplers_are_compared_each_with_its_own_base(bench: _Bench) -> None:
    base, *others = _records("sampler", bench)
    assert base["difference"] == {"layout": -50 + 20, "against": -50 + 20}
    for record in others:
        assert record["difference"] == {"layout": 50 - 20, "against": -50 + 20}
        assert record["both"] == {"layout": [20, 50], "against": [-20, -50]}


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
