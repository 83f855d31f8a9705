"""ControlNets against diffusers': the network, and whole trajectories of its pipelines."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import engine
from engine.models.controlnet import ControlNetConfig, ControlNetModel
from tests.controlnets import HINT_CHANNELS, hint, make_controlnet
from tests.pipelines import SCHEDULERS, SD_V1_5_SCHEDULER, SHAPES, make_unet, relative_error, save_pipeline

_TOLERANCE = 2e-5


@pytest.mark.parametrize("options", [{}, {"controlnet_conditioning_channel_order": "bgr"}], ids=["rgb", "bgr"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_network(shape: str, options: dict[str, Any], agrees) -> None:
    theirs = make_controlnet(make_unet(shape), HINT_CHANNELS[shape], **options)
    ours = ControlNetModel(ControlNetConfig.from_dict(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict())
    factor = ours.control.factor
    sample, context, pictures = (
        torch.randn(2, 4, 9, 11),
        torch.randn(2, 77, 32),
        torch.rand(2, 3, 9 * factor, 11 * factor),
    )
    timesteps = torch.tensor([3, 700])
    skips, middle = theirs(sample, timesteps, context, pictures, conditioning_scale=0.7, return_dict=False)
    found = ours(sample, timesteps, context, pictures, scale=0.7)
    assert len(found.skips) == len(skips) == ours.n_residuals - 1
    pairs = [*zip(found.skips, skips, strict=True), (found.middle, middle)]
    error = max(relative_error(0.7 * own, other) for own, other in pairs)
    assert torch.equal(found.scales, torch.full((2, ours.n_residuals), 0.7))
    agrees("ControlNet, small random models", "ControlNetModel", error, _TOLERANCE)


class _Both:
    """A model and two nets, here and in diffusers."""

    def __init__(self, folder: Path) -> None:
        self.pipeline, self.sd = save_pipeline("narrow", folder / "model"), engine.load(folder / "model")
        self.theirs, self.nets = [], []
        kinds: list[dict[str, Any]] = [
            {},
            {"controlnet_conditioning_channel_order": "bgr"},
            {"global_pool_conditions": True},
        ]
        for seed, options in enumerate(kinds):
            net = make_controlnet(self.pipeline.unet, HINT_CHANNELS["narrow"], seed, **options)
            net.save_pretrained(folder / str(seed))
            self.theirs.append(net)
            self.nets.append(engine.load_controlnet(folder / str(seed), self.sd))

    def expected(self, kind: Any, sampler: str, nets: list[int], **options: Any) -> torch.Tensor:
        scheduler, changes = SCHEDULERS[sampler]
        names = ("vae", "text_encoder", "tokenizer", "unet")
        chosen = [self.theirs[i] for i in nets]
        pipeline = kind(
            **{name: getattr(self.pipeline, name) for name in names},
            scheduler=scheduler.from_config(SD_V1_5_SCHEDULER, **changes),
            controlnet=chosen[0] if len(chosen) == 1 else chosen,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(**options, output_type="latent").images


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> _Both:
    return _Both(tmp_path_factory.mktemp("control"))


def _generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


_PROMPTS, _NEGATIVES = ["a red cat", "a dog on a beach"], ["blurry", ""]
_CASES: dict[str, tuple[list[int], dict[str, list[Any]]]] = {  # nets, and what of each control differs from its default
    "one": ([0], {}),
    "one, weight": ([0], {"weight": [0.7]}),
    "one, some steps": ([0], {"weight": [0.7], "start": [0.2], "end": [0.8]}),
    "two": ([0, 1], {"weight": [0.7, -0.4]}),
    "two, some steps": ([1, 0], {"weight": [1.3, 0.7], "start": [0.2, 0.0], "end": [0.8, 0.5]}),
    "the same twice": ([0, 0], {"weight": [0.5, 0.8]}),
    "guess mode": ([0], {"weight": [0.7], "guess": [True]}),
    "guess mode, two": ([0, 1], {"guess": [True, True], "end": [1.0, 0.6]}),
    "pooled": ([2], {"weight": [0.7], "end": [0.8]}),
    "pooled, guess mode": ([2], {"guess": [True]}),
}


def _controls(both: _Both, nets: list[int], hints: list[Any], changes: dict[str, list[Any]]) -> list[engine.Control]:
    names = {"weight": "weight", "start": "start", "end": "end", "guess": "guess_mode"}
    return [
        engine.Control(both.nets[net], picture, **{names[name]: values[i] for name, values in changes.items()})
        for i, (net, picture) in enumerate(zip(nets, hints, strict=True))
    ]


def _their_options(nets: list[int], hints: list[Any], changes: dict[str, list[Any]], name: str) -> dict[str, Any]:
    def each(key: str, default: float) -> Any:
        values = changes.get(key, [default] * len(nets))
        return values[0] if len(nets) == 1 else values

    return {
        name: hints[0] if len(nets) == 1 else hints,
        "controlnet_conditioning_scale": each("weight", 1.0),
        "control_guidance_start": each("start", 0.0),
        "control_guidance_end": each("end", 1.0),
        "guess_mode": "guess" in changes,
    }


@pytest.mark.parametrize("guidance", [7.5, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "euler"])
@pytest.mark.parametrize("case", _CASES)
def test_text_to_image(both: _Both, case: str, sampler: str, guidance: float, agrees) -> None:
    nets, changes = _CASES[case]
    hints = [hint(i, 16, 24) for i in range(len(nets))]
    negative = _NEGATIVES if guidance > 1 else ["", ""]
    expected = both.expected(
        diffusers.StableDiffusionControlNetPipeline,
        sampler,
        nets,
        prompt=_PROMPTS,
        negative_prompt=negative,
        num_inference_steps=7,
        guidance_scale=guidance,
        generator=_generators([5, 6]),
        **_their_options(nets, hints, changes, "image"),
    )
    options: dict[str, Any] = {"negative_prompt": negative, "guidance_scale": guidance, "seed": 5, "steps": 7}
    options |= {"height": 16, "width": 24, "sampler": sampler, "output": "latent", "progress": False}
    out = both.sd.generate(_PROMPTS, control=_controls(both, nets, hints, changes), **options)
    error = relative_error(out.latents, expected)
    agrees(f"ControlNet, {case}", "StableDiffusionControlNetPipeline", error, _TOLERANCE)
    assert relative_error(both.sd.generate(_PROMPTS, **options).latents, expected) > 1e-2


@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun"])
@pytest.mark.parametrize("case", ["one, some steps", "two, some steps", "guess mode"])
def test_image_to_image(both: _Both, case: str, sampler: str, agrees) -> None:
    nets, changes = _CASES[case]
    hints, start = [hint(i, 16, 24) for i in range(len(nets))], hint(9, 16, 24)
    expected = both.expected(
        diffusers.StableDiffusionControlNetImg2ImgPipeline,
        sampler,
        nets,
        prompt=_PROMPTS,
        image=[start] * 2,
        strength=0.7,
        num_inference_steps=10,
        guidance_scale=5.0,
        generator=_generators([5, 6]),
        **_their_options(nets, hints, changes, "control_image"),
    )
    options: dict[str, Any] = {"sampler": sampler, "output": "latent", "progress": False}
    controls = _controls(both, nets, hints, changes)
    out = both.sd.generate(
        _PROMPTS, image=start, strength=0.7, steps=10, guidance_scale=5.0, seed=5, control=controls, **options
    )
    agrees(
        "ControlNet, image to image",
        "StableDiffusionControlNetImg2ImgPipeline",
        relative_error(out.latents, expected),
        _TOLERANCE,
    )


def test_hints_for_each_prompt_in_sizes_and_modes_of_their_own(both: _Both) -> None:
    grey = Image.fromarray(np.random.default_rng(7).integers(0, 256, (31, 20), dtype=np.uint8))
    hints = [hint(3, 40, 50), grey.convert("RGB")]
    expected = both.expected(
        diffusers.StableDiffusionControlNetPipeline,
        "ddim",
        [0],
        prompt=_PROMPTS,
        image=hints,
        height=16,
        width=24,
        num_inference_steps=4,
        num_images_per_prompt=2,
        generator=_generators([5, 6, 7, 8]),
    )
    options: dict[str, Any] = {"height": 16, "width": 24, "steps": 4, "guidance_scale": 7.5, "images_per_prompt": 2}
    given: Any
    for given in ([hints[0], grey], [hints[0], np.asarray(grey)], [hints[0], hints[0], grey, grey]):
        control = engine.Control(both.nets[0], given)
        out = both.sd.generate(_PROMPTS, seed=5, control=control, output="latent", progress=False, **options)
        assert relative_error(out.latents, expected) <= _TOLERANCE


def test_arrays_of_floats_are_not_rounded(both: _Both) -> None:
    depth = np.random.default_rng(0).random((16, 24, 3)).astype(np.float32)
    expected = both.expected(
        diffusers.StableDiffusionControlNetPipeline,
        "ddim",
        [0],
        prompt="a cat",
        image=torch.from_numpy(depth).permute(2, 0, 1)[None],
        num_inference_steps=4,
        generator=_generators([5]),
    )
    control = engine.Control(both.nets[0], depth)
    options: dict[str, Any] = {"height": 16, "width": 24, "steps": 4, "guidance_scale": 7.5, "seed": 5}
    out = both.sd.generate("a cat", control=control, output="latent", progress=False, **options)
    assert relative_error(out.latents, expected) <= 2e-6


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
@pytest.mark.parametrize("case", ["one, some steps", "guess mode"])
def test_inpainting(both: _Both, case: str, sampler: str, agrees) -> None:
    nets, changes = _CASES[case]
    start, mask = hint(9, 16, 24), np.zeros((16, 24), np.uint8)
    mask[4:12, 8:20] = 255
    expected = both.expected(
        diffusers.StableDiffusionControlNetInpaintPipeline,
        sampler,
        nets,
        prompt="a red cat",
        image=start,
        mask_image=Image.fromarray(mask),
        strength=0.7,
        num_inference_steps=10,
        guidance_scale=5.0,
        generator=_generators([5]),
        height=16,
        width=24,
        **_their_options(nets, [hint(0, 16, 24)], changes, "control_image"),
    )
    out = both.sd.generate(
        "a red cat",
        image=start,
        mask=Image.fromarray(mask),
        strength=0.7,
        steps=10,
        guidance_scale=5.0,
        seed=5,
        control=_controls(both, nets, [hint(0, 16, 24)], changes),
        sampler=sampler,
        output="latent",
        progress=False,
    )
    against = "StableDiffusionControlNetInpaintPipeline"
    agrees("ControlNet, inpainting", against, relative_error(out.latents, expected), _TOLERANCE)
