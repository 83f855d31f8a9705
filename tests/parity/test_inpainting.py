"""Inpainting against diffusers' pipeline: every latent on the way, on models of four and of nine channels; crops."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageFilter
from torch import Tensor

import engine
from engine.sampling.mask import Crop, _fitted, crop_box
from engine.sampling.samplers import SAMPLERS
from tests.pipelines import SCHEDULERS, SD_V1_5_SCHEDULER, save_pipeline

_TOLERANCE = 2e-5
_PROMPTS = ["a red cat", "a dog on a beach"]
# whose noise diffusers draws by torchsde; dpm2 has a test of its own
_SAMPLERS = [name for name in SAMPLERS if name not in ("dpmpp_sde", "dpm2")]
_PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")

Agrees = Callable[[str, str, float, float], None]


class _LevelsOfItsOwn(diffusers.KDPM2DiscreteScheduler):
    """diffusers noises what it keeps between two levels as at the lower one; here as where the model then looks."""

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.state_in_first_order or self.step_index is None:
            return super().add_noise(original_samples, noise, timesteps)
        return original_samples + noise * self.sigmas_interpol[self.step_index]


def _pipeline(folder: Path, in_channels: int) -> tuple[Any, engine.Engine]:
    made = save_pipeline("narrow", folder, seed=in_channels, in_channels=in_channels)
    pipeline = diffusers.StableDiffusionInpaintPipeline(
        **{name: getattr(made, name) for name in _PARTS},
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, engine.load(folder)


@pytest.fixture(scope="module")
def of_four(tmp_path_factory):
    return _pipeline(tmp_path_factory.mktemp("four"), 4)


@pytest.fixture(scope="module")
def of_nine(tmp_path_factory):
    return _pipeline(tmp_path_factory.mktemp("nine"), 9)


def _pictures(n: int, size: tuple[int, int], seed: int = 0) -> list[Image.Image]:
    """Smooth ones, so that a shift shows."""
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 6, 8, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize(size, Image.Resampling.BICUBIC) for one in pixels]


def _mask(size: tuple[int, int], box: tuple[int, int, int, int], mode: str = "L") -> Image.Image:
    mask = Image.new(mode, size)
    mask.paste(255 if mode != "RGB" else "white", box)
    return mask


_MASKS = [_mask((24, 16), (3, 5, 13, 11)), _mask((24, 16), (0, 0, 9, 16))]


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def _compare(both: Any, sampler: str, strength: float, scheduler: Any = None, **options: Any) -> float:
    """The largest relative error of all latents on the way."""
    pipeline, sd = both
    found, more = SCHEDULERS[sampler]
    pipeline.scheduler = (scheduler or found).from_config(SD_V1_5_SCHEDULER, **more)
    eta = {"eta": options["eta"]} if "eta" in options else {}
    given = {"image": _pictures(2, (24, 16)), "strength": strength, "guidance_scale": 5.0}
    masks = options.get("mask", _MASKS)
    theirs: list[Tensor] = []

    def keep(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        theirs.append(tensors["latents"].clone())
        return tensors

    pipeline(
        _PROMPTS,
        mask_image=masks,
        num_inference_steps=10,
        height=16,
        width=24,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        output_type="latent",
        callback_on_step_end=keep,
        **given,
        **eta,
    )
    ours: list[Tensor] = []
    sd.generate(
        _PROMPTS,
        mask=masks,
        steps=10,
        seed=3,
        sampler=sampler,
        output="latent",
        progress=False,
        callback=lambda _step, _total, latents: ours.append(latents.clone()),
        **given,
        **eta,
    )
    assert len(ours) == len(theirs) > 1
    return max(_error(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("sampler", _SAMPLERS)
def test_four_channels(of_four, sampler: str, strength: float, agrees: Agrees) -> None:
    error = _compare(of_four, sampler, strength)
    agrees("inpainting by blending, every sampler", "StableDiffusionInpaintPipeline", error, _TOLERANCE)


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("sampler", _SAMPLERS)
def test_nine_channels(of_nine, sampler: str, strength: float, agrees: Agrees) -> None:
    error = _compare(of_nine, sampler, strength)
    agrees("inpainting models, every sampler", "StableDiffusionInpaintPipeline", error, _TOLERANCE)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_between_two_levels_dpm2_keeps_the_picture_at_its_own(of_four, strength: float) -> None:
    assert _compare(of_four, "dpm2", strength, _LevelsOfItsOwn) <= _TOLERANCE
    assert _compare(of_four, "dpm2", strength) > 1e-3, "diffusers' own level, which is the lower one's"


@pytest.mark.parametrize("both", ["of_four", "of_nine"])
def test_fresh_noise_on_the_way(request: pytest.FixtureRequest, both: str) -> None:
    assert _compare(request.getfixturevalue(both), "ddim", 0.8, eta=0.7) <= _TOLERANCE


@pytest.mark.parametrize("both", ["of_four", "of_nine"])
@pytest.mark.parametrize(
    "masks",
    [
        [_mask((13, 9), (2, 2, 7, 6)), _mask((61, 40), (20, 1, 60, 17))],
        [_mask((13, 9), (2, 2, 7, 6), "1"), _mask((48, 32), (20, 1, 41, 17), "RGB")],
    ],
    ids=["grey", "one bit and colour"],
)
def test_masks_of_other_sizes(request: pytest.FixtureRequest, both: str, masks: list[Image.Image]) -> None:
    """Black and white ones are scaled and cut at one half, as diffusers does with all."""
    pair = request.getfixturevalue(both)
    errors = [_compare(pair, "euler", 0.7, mask=[mask, mask]) for mask in masks]  # diffusers stacks masks of one size
    assert max(errors) <= _TOLERANCE


@pytest.mark.parametrize("both", ["of_four", "of_nine"])
@pytest.mark.parametrize(
    ("box", "padding", "size"),
    [
        ((10, 8, 20, 15), 4, (16, 16)),
        ((0, 0, 5, 4), 0, (24, 16)),
        ((30, 20, 40, 28), 6, (16, 24)),
        ((2, 10, 38, 14), 1, (16, 16)),  # wider than the picture lets it be square
        ((12, 0, 16, 28), 3, (32, 16)),
    ],
)
def test_crops(
    request: pytest.FixtureRequest, both: str, box: tuple[int, int, int, int], padding: int, size: tuple[int, int]
) -> None:
    pipeline, sd = request.getfixturevalue(both)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(SD_V1_5_SCHEDULER)
    (picture,), mask = _pictures(1, (40, 28), seed=2), _mask((40, 28), box)
    width, height = size
    expected = pipeline(
        "a cat",
        image=picture,
        mask_image=mask,
        padding_mask_crop=padding,
        height=height,
        width=width,
        strength=0.75,
        num_inference_steps=5,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(1),
    ).images[0]
    out = sd.generate(
        "a cat", image=picture, mask=mask, mask_padding=padding, height=height, width=width, strength=0.75, steps=5,
        guidance_scale=5.0, seed=1, progress=False,
    )  # fmt: skip
    (drawn,) = out.images
    assert drawn.size == expected.size == (40, 28)
    difference = np.abs(np.asarray(drawn).astype(int) - np.asarray(expected))
    assert difference.max() <= 1
    kept = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(drawn)[kept], np.asarray(picture)[kept])
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(picture))[~kept].mean() > 3


def test_blurred_masks_on_nine_channels(of_nine) -> None:
    """Both cut it at one half for the model, and paste by what it was before."""
    pipeline, sd = of_nine
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(SD_V1_5_SCHEDULER)
    (picture,), mask = _pictures(1, (40, 28), seed=2), _mask((40, 28), (14, 9, 26, 20))
    shared = {"image": picture, "height": 16, "width": 24, "strength": 0.75, "guidance_scale": 5.0}
    expected = pipeline(
        "a cat",
        mask_image=pipeline.mask_processor.blur(mask, 3),
        padding_mask_crop=2,
        num_inference_steps=5,
        generator=torch.Generator().manual_seed(1),
        **shared,
    ).images[0]
    out = sd.generate("a cat", mask=mask, mask_blur=3, mask_padding=2, steps=5, seed=1, progress=False, **shared)
    difference = np.abs(np.asarray(out.images[0]).astype(int) - np.asarray(expected))
    assert difference.max() <= 4, "diffusers multiplies by small alphas in 8 bits before it blends"
    assert difference.mean() < 0.5


def test_crop_boxes_are_those_of_diffusers() -> None:
    choice = random.Random(0)
    for _ in range(300):
        size = choice.randint(4, 60), choice.randint(4, 60)
        left, top = choice.randrange(size[0]), choice.randrange(size[1])
        box = left, top, choice.randint(left + 1, size[0]), choice.randint(top + 1, size[1])
        asked = choice.randint(8, 64), choice.randint(8, 64), choice.randint(0, 12)
        mask = _mask(size, box)
        theirs = VaeImageProcessor.get_crop_region(mask, asked[0], asked[1], asked[2])
        assert crop_box(mask, *asked) == theirs, (size, box, asked)


@pytest.mark.parametrize("mode", ["RGB", "L", "1"])
def test_fitting_and_pasting_are_those_of_diffusers(mode: str) -> None:
    processor = VaeImageProcessor(vae_scale_factor=2)
    choice, blur = random.Random(1), ImageFilter.GaussianBlur(2)
    for number in range(40):
        size = choice.randint(4, 40), choice.randint(4, 40)
        width, height = (2 * choice.randint(4, 20) for _ in range(2))
        (picture,) = _pictures(1, size, seed=number)
        one = picture.convert(mode)
        fitted = processor.resize(one, height, width, resize_mode="fill")
        assert np.array_equal(np.asarray(_fitted(one, width, height).convert("RGB")), np.asarray(fitted)), (size, width)
        if mode != "RGB":
            continue
        left, top = choice.randrange(size[0]), choice.randrange(size[1])
        box = left, top, choice.randint(left + 1, size[0]), choice.randint(top + 1, size[1])
        (drawn,) = _pictures(1, (width, height), seed=100 + number)
        for mask, most in ((_mask(size, box), 0), (_mask(size, box).filter(blur), 4)):
            region = crop_box(mask, width, height, 1)
            ours = np.asarray(Crop(picture, mask, region).paste(drawn)).astype(int)
            theirs = np.asarray(processor.apply_overlay(mask, picture, drawn, region)).astype(int)
            assert np.abs(ours - theirs).max() <= most
