"""Requests that step together get what each gets alone, whoever joins and leaves, at any step."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import engine
from benchmarks.systems import default_request
from engine.backends.graphs import signature
from engine.observe.progress import StageClock
from engine.sampling.join import Size, bucket, exactly, join_phases
from engine.sampling.loop import Denoising, Stepper, denoise
from engine.sampling.samplers import SAMPLERS
from tests.parity.test_ico import _concept as ico_concept
from tests.pipelines import random_concept

PROMPT = "a photo of a cat"


def _kinds(sd: engine.Engine) -> dict[str, dict[str, Any]]:
    concepts, learned = [random_concept(sd, seed=seed) for seed in (1, 2)], ico_concept(sd)
    picture = np.random.default_rng(0).random((16, 16, 3)).astype(np.float32)
    return {
        "plain": {},
        "two nouns": {
            "customization": engine.Infusion([concepts[0], replace(concepts[1], noun="boat")]),
            "prompt": "a photo of a boat and a cat",
        },
        "without guidance": {"guidance_scale": 1.0},
        "rescaled": {"guidance_rescale": 0.6},
        "three": {"images_per_prompt": 3, "negative_prompt": "blue"},
        "from a picture": {"image": picture, "strength": 0.6},
        "varied": {"variation_seed": [4, 5], "variation_strength": 0.4, "images_per_prompt": 2},
        "parallel": {"customization": engine.Infusion(concepts[:1])},
        "shared": {"customization": engine.Infusion(concepts[1:], foundation="shared")},
        "follower without guidance": {"customization": engine.Infusion(concepts[:1]), "guidance_scale": 1.0},
        "many on one foundation": {
            "images_per_prompt": 3,
            "seed": [5, 5, 5],
            "customization": [None, engine.Infusion(concepts[:1]), engine.Infusion(concepts[1:], strength=2.0)],
        },
        "ico": {"customization": engine.ICO([learned]), "prompt": f"a photo of a {learned.placeholder}"},
        "dci": {"customization": engine.DCI("cat", fraction=0.5)},
        "dci, own noise": {
            "customization": engine.DCI("cat", "boat", fraction=1.0, noise="independent", guidance="own", strength=0.5)
        },
        "dci twice": {"customization": engine.DCI("cat", fraction=0.3), "images_per_prompt": 2},
    }


def _begin(sd: engine.Engine, **options: Any) -> Denoising:
    given = {"prompt": PROMPT, "steps": 5, "seed": 3} | options
    return sd.begin(default_request(sd, given.pop("prompt"), **given), StageClock(sd.device))


def _step_at_random(stepper: Stepper, runs: list[Denoising], seed: int) -> None:
    """Some of those that are left at a time, in any order."""
    choice = random.Random(seed)
    while left := [one for one in runs if not one.is_done]:
        stepper(choice.sample(left, choice.randint(1, len(left))))


def _error(one: Denoising, other: Denoising) -> float:
    return float((one.x - other.x).norm() / other.x.norm())


@pytest.mark.parametrize("size", [exactly, bucket])
@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_every_kind_steps_with_every_other(small: engine.Engine, size: Size, seed: int) -> None:
    samplers = random.Random(seed).choices(list(SAMPLERS), k=len(_kinds(small)))
    kinds = {
        name: {"sampler": sampler, "seed": [10 * i, 10 * i + 1, 10 * i + 2][: options.get("images_per_prompt", 1)]}
        | {"steps": 3 + i % 4}
        | options
        for i, ((name, options), sampler) in enumerate(zip(_kinds(small).items(), samplers, strict=True))
    }
    alone = {name: _begin(small, **options) for name, options in kinds.items()}
    for one in alone.values():
        denoise(small.stepper(), one, lambda _i, _x: True)
    together = {name: _begin(small, **options) for name, options in kinds.items()}
    _step_at_random(small.stepper(size), list(together.values()), seed)
    for name, one in together.items():
        assert _error(one, alone[name]) < 1e-5, (name, kinds[name])
        assert one.finite.all()


@pytest.mark.parametrize("sampler", SAMPLERS)
@torch.no_grad()
def test_every_sampler_joins_and_leaves(small: engine.Engine, sampler: str) -> None:
    """At a step of its own, beside a sampler with another history and noise."""
    other = "pndm" if sampler != "pndm" else "euler_ancestral"
    alone, joined = (_begin(small, sampler=sampler, steps=6) for _ in range(2))
    denoise(small.stepper(), alone, lambda _i, _x: True)
    stepper = small.stepper()
    beside = _begin(small, sampler=other, steps=4, seed=9, prompt="a red boat")
    stepper([beside])
    stepper([beside])
    stepper([joined])
    while not beside.is_done:
        stepper([joined, beside])
    denoise(stepper, joined, lambda _i, _x: True)
    assert _error(joined, alone) < 1e-5


@torch.no_grad()
def test_generators_join(small: engine.Engine) -> None:
    """What one of them draws for several images depends on nothing beside it."""

    def begin() -> Denoising:
        generator = torch.Generator().manual_seed(6)
        return _begin(small, images_per_prompt=2, generator=generator, seed=None, sampler="euler_ancestral")

    alone, joined = begin(), begin()
    denoise(small.stepper(), alone, lambda _i, _x: True)
    _step_at_random(small.stepper(), [joined, _begin(small, seed=9, prompt="a red boat")], seed=0)
    assert _error(joined, alone) < 1e-5
    assert _error(joined, _begin(small, images_per_prompt=2, seed=6)) > 1e-2


@torch.no_grad()
def test_buckets_leave_graphs_few(small: engine.Engine) -> None:
    """Requests of like kinds, however many, are of few signatures."""
    signatures = set()
    for n in range(1, 17):
        runs = [_begin(small, seed=i, steps=2 + i % 2, prompt=f"a cat {i}") for i in range(n)]
        phase, offsets = join_phases([one.enter_step() for one in runs], [one.timetable for one in runs], bucket)
        signatures.add(signature(phase))
        assert len(offsets) == n
        assert len(set(offsets)) == min(n, 2), "one place for each schedule"
    assert len(signatures) == len({bucket(n) for n in range(1, 17)}) == 8


def test_buckets() -> None:
    assert [bucket(n) for n in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 17, 25, 33)] == [
        0, 1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 16, 24, 32, 48
    ]  # fmt: skip
    assert [exactly(n) for n in (0, 5, 17)] == [0, 5, 17]


@torch.no_grad()
def test_what_a_batch_shares_is_joined_once(small: engine.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.sampling import loop

    joined = []
    monkeypatch.setattr(loop, "join_phases", lambda *given: joined.append(given) or join_phases(*given))
    one, other = _begin(small, steps=6), _begin(small, steps=6, customization=engine.DCI("cat", fraction=0.5))
    stepper = small.stepper()
    for _ in range(6):
        stepper([one, other])
    assert len(joined) == 2, "when they met, and when the auxiliary branch left"


@torch.no_grad()
def test_a_failed_step_changes_nothing(small: engine.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, interrupted = (_begin(small, customization=engine.DCI("cat", fraction=0.5)) for _ in range(2))
    denoise(small.stepper(), expected, lambda _i, _x: True)
    stepper = small.stepper()

    def fail(*_: object) -> None:
        raise RuntimeError("no")

    while not interrupted.is_done:
        with monkeypatch.context() as patch:
            patch.setattr(small.unet, "denoise", fail)
            with pytest.raises(RuntimeError, match="no"):
                stepper([interrupted])
        stepper([interrupted])
    assert torch.equal(interrupted.x, expected.x)
