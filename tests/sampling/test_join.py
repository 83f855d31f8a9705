"""Requests that step together get what each gets alone, whoever joins and leaves, at any step."""

import random
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import engine
from benchmarks.systems import default_request
from engine.backends.graphs import signature
from engine.observe.progress import StageClock
from engine.sampling.join import Size, bucket, exactly, join_phases, join_states
from engine.sampling.loop import Denoising, Stepper, denoise
from engine.sampling.samplers import SAMPLERS
from tests.controlnets import hint, random_controlnet
from tests.ip_adapters import picture as adapter_picture
from tests.ip_adapters import random_adapter
from tests.parity.test_ico import _concept as ico_concept
from tests.pipelines import random_concept

PROMPT = "a photo of a cat"
_LONG, _LONGER = f"{PROMPT} " + "on a red beach " * 20, f"{PROMPT} " + "in the snow on a blue beach " * 24


@cache
def _nets(sd: engine.Engine, folder: Path) -> list[Any]:
    with tempfile.TemporaryDirectory() as place:
        return [random_controlnet(sd, Path(place) / str(seed), folder, seed) for seed in range(2)]


def _controlled(sd: engine.Engine, folder: Path) -> dict[str, dict[str, Any]]:
    """Kinds with ControlNets: one net of several requests, several of one, at some of the steps, once and twice."""
    (one, other), concept, pictures = _nets(sd, folder), random_concept(sd, seed=3), [hint(i) for i in range(3)]
    windows = [
        engine.Control(one, pictures[0], 0.8, start=0.2, end=0.8),
        engine.Control(other, pictures[1], -0.5, end=0.5),
    ]
    return {
        "net": {"control": engine.Control(one, pictures[0])},
        "net, in guess mode": {"control": engine.Control(one, pictures[2], guess_mode=True)},
        "net without guidance": {"control": engine.Control(other, pictures[0]), "guidance_scale": 1.0},
        "two nets, some steps": {"control": windows, "images_per_prompt": 2},
        "net twice": {"control": [engine.Control(one, picture, 0.5) for picture in pictures[:2]]},
        "net, a hint an image": {"control": engine.Control(one, pictures), "images_per_prompt": 3},
        "net on parallel": {"control": windows[1:], "customization": engine.Infusion([concept])},
        "net on shared": {
            "control": engine.Control(one, pictures[1], guess_mode=True),
            "customization": engine.Infusion([concept], foundation="shared"),
        },
        "net on dci": {"control": windows, "customization": engine.DCI("cat", "boat", fraction=0.5)},
    }


def _kinds(sd: engine.Engine) -> dict[str, dict[str, Any]]:
    concepts, learned = [random_concept(sd, seed=seed) for seed in (1, 2)], ico_concept(sd)
    picture = np.random.default_rng(0).random((16, 16, 3)).astype(np.float32)
    mask = np.zeros((16, 16), np.float32)
    mask[3:9, 5:14] = 1
    like = [engine.ImagePrompt(random_adapter(sd, kind), adapter_picture(1), scale=0.7) for kind in ("plain", "plus")]
    return {
        "plain": {},
        "like a picture": {"image_prompts": like[0]},
        "like two, without guidance": {"image_prompts": like, "guidance_scale": 1.0},
        "some like pictures": {"images_per_prompt": 3, "image_prompts": [None, like[1:], like]},
        "parallel, like a picture": {"customization": engine.Infusion(concepts[:1]), "image_prompts": like[1]},
        "dci, like a picture": {"customization": engine.DCI("cat", fraction=0.5), "image_prompts": like[0]},
        "two nouns": {
            "customization": engine.Infusion([concepts[0], replace(concepts[1], noun="boat")]),
            "prompt": "a photo of a boat and a cat",
        },
        "without guidance": {"guidance_scale": 1.0},
        "rescaled": {"guidance_rescale": 0.6},
        "three": {"images_per_prompt": 3, "negative_prompt": "blue"},
        "from a picture": {"image": picture, "strength": 0.6},
        "inpainted": {"image": picture, "mask": mask, "strength": 0.7},
        "inpainted as a whole": {"image": picture, "mask": mask, "mask_blur": 2.0, "strength": 1.0},
        "inpainted by two branches": {
            "image": picture,
            "mask": 1 - mask,
            "customization": engine.DCI("cat", fraction=0.5, noise="independent"),
        },
        "inpainted on a foundation": {
            "image": picture,
            "mask": mask,
            "mask_padding": 1,
            "customization": engine.Infusion(concepts[:1]),
        },
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
        "long": {"prompt": _LONG},
        "longer, with a long negative prompt": {"prompt": _LONGER, "negative_prompt": "red " * 90},
        "long and short": {"prompt": [PROMPT, _LONG], "images_per_prompt": 1, "seed": [40, 41]},
        "long, parallel": {"prompt": _LONG, "customization": engine.Infusion(concepts[:1])},
        "longer, shared": {"prompt": _LONGER, "customization": engine.Infusion(concepts[1:], foundation="shared")},
        "long, dci": {"prompt": _LONG, "customization": engine.DCI("cat", fraction=0.5)},
        "longer, dci": {"prompt": _LONGER, "customization": engine.DCI("cat", fraction=0.5)},
        "edited": {"prompt": "a [red:blue:0.5] cat", "negative_prompt": "[dark:2]"},
        "edited to be long": {"prompt": f"a [cat:{_LONG}:2]", "customization": engine.Infusion(concepts[:1])},
        "alternating": {"prompt": "a [red|blue|] cat", "customization": engine.DCI("cat", fraction=0.5)},
        "of an earlier layer": {"clip_skip": 1},
        "cut off": {"prompt": _LONGER, "long_prompts": "truncate"},
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
def test_every_kind_steps_with_every_other(small: engine.Engine, small_folder: Path, size: Size, seed: int) -> None:
    given = _kinds(small) | _controlled(small, small_folder)
    samplers = random.Random(seed).choices(list(SAMPLERS), k=len(given))
    kinds = {
        name: {"sampler": sampler, "seed": [10 * i, 10 * i + 1, 10 * i + 2][: options.get("images_per_prompt", 1)]}
        | {"steps": 3 + i % 4}
        | options
        for i, ((name, options), sampler) in enumerate(zip(given.items(), samplers, strict=True))
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


@pytest.mark.parametrize("size", [exactly, bucket])
@torch.no_grad()
def test_inpainting_models_step_with_one_another(inpainting: engine.Engine, size: Size) -> None:
    """Each row is told its own mask and picture."""
    kinds = {
        name: {"sampler": sampler, "seed": 10 * i, "steps": 3 + i} | options
        for i, ((name, options), sampler) in enumerate(
            zip(
                ((name, one) for name, one in _kinds(inpainting).items() if "mask" in one),
                ("ddim", "heun", "euler_ancestral", "unipc"),
                strict=True,
            )
        )
    }
    alone = {name: _begin(inpainting, **options) for name, options in kinds.items()}
    for one in alone.values():
        denoise(inpainting.stepper(), one, lambda _i, _x: True)
    together = {name: _begin(inpainting, **options) for name, options in kinds.items()}
    _step_at_random(inpainting.stepper(size), list(together.values()), 0)
    for name, one in together.items():
        assert _error(one, alone[name]) < 1e-5, name


@torch.no_grad()
def test_a_plain_row_beside_an_inpainted_one_keeps_nothing(small: engine.Engine) -> None:
    """To the bit: what is blended into it has a factor of zero."""
    mask = np.zeros((16, 16), bool)
    mask[4:, 4:] = True
    picture = np.full((16, 16, 3), 0.5, np.float32)
    plain, inpainted = _begin(small), _begin(small, image=picture, mask=mask, strength=1.0)
    phase, offsets = join_phases([plain.plan, inpainted.plan], [plain.timetable, inpainted.timetable], exactly)
    state = join_states([plain, inpainted], offsets, phase)
    assert state.inpainting is not None
    x = torch.randn_like(state.x)
    kept = state.inpainting.keep(x, phase.coefficients, state.positions)
    assert torch.equal(kept[0], x[0])
    assert not torch.equal(kept[1], x[1])
    assert join_states([plain], offsets[:1], phase).inpainting is None


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


@torch.no_grad()
def test_buckets_leave_graphs_of_nets_few(small: engine.Engine, small_folder: Path) -> None:
    """Whichever of the requests have the net."""
    net, signatures = _nets(small, small_folder)[0], set()
    for n in (5, 6):
        for first in range(2):
            controls = [{"control": engine.Control(net, hint(i))} if first <= i < first + 3 else {} for i in range(n)]
            runs = [_begin(small, seed=i, steps=2, **controls[i]) for i in range(n)]
            phase, _ = join_phases([one.enter_step() for one in runs], [one.timetable for one in runs], bucket)
            signatures.add(signature(phase))
    assert len(signatures) == 1


@torch.no_grad()
def test_a_net_is_run_once_and_adds_to_a_row_once(small: engine.Engine, small_folder: Path) -> None:
    """For all requests together; only where a picture has it twice there is a second run."""
    kinds = _controlled(small, small_folder)
    runs = [_begin(small, **kinds[name]) for name in ("net", "net twice", "net, in guess mode", "two nets, some steps")]
    for one in runs:
        one.taken = 1  # of five: all nets act
    phase, _ = join_phases([one.enter_step() for one in runs], [one.timetable for one in runs], exactly)
    one, other = _nets(small, small_folder)
    assert [(rows.net, rows.use, len(rows.rows)) for rows in phase.rows.nets] == [
        (one, 0, 2 + 2 + 1 + 4), (one, 1, 2), (other, 0, 4)
    ]  # fmt: skip
    assert all(len(set(rows.rows.tolist())) == len(rows.rows) for rows in phase.rows.nets)


@torch.no_grad()
def test_rows_and_latents_of_a_net_filled_up_to_as_many(small: engine.Engine, small_folder: Path) -> None:
    """Six rows on five latents are six on six where sizes are rounded: nothing is shared then."""
    net = _nets(small, small_folder)[0]
    controls = [engine.Control(net, hint(i), guess_mode=i < 4) for i in range(5)]
    alone, together = ([_begin(small, seed=i, control=one) for i, one in enumerate(controls)] for _ in range(2))
    for one in alone:
        small.stepper()([one])
    small.stepper(bucket)(together)
    for one, other in zip(together, alone, strict=True):
        assert _error(one, other) < 1e-5


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
