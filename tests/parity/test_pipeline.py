"""Whole trajectories against diffusers' pipelines: same prompts, same seeds, same latents and pictures."""

import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import engine
from engine.sampling.samplers import SAMPLERS
from tests.pipelines import SCHEDULERS, SD_V1_5_SCHEDULER, SHAPES, relative_error, save_pipeline

_TOLERANCE = 2e-4
_SAMPLERS = [name for name in SAMPLERS if name != "dpmpp_sde"]  # whose noise diffusers draws by torchsde


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    return save_pipeline("narrow", folder), engine.load(folder)


def _use(pipeline, sampler: str) -> None:
    scheduler, options = SCHEDULERS[sampler]
    pipeline.scheduler = scheduler.from_config(SD_V1_5_SCHEDULER, **options)


def _generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize("sampler", _SAMPLERS)
def test_every_sampler(both, sampler: str, steps: int, agrees) -> None:
    pipeline, sd = both
    _use(pipeline, sampler)
    prompts, negatives = ["a red cat", "a blue car on a beach", "a dog"], ["blurry", "", "dark"]
    expected = pipeline(
        prompts,
        negative_prompt=negatives,
        height=16,
        width=24,
        num_inference_steps=steps,
        guidance_scale=7.5,
        generator=_generators([5, 6, 9]),
        output_type="latent",
    ).images
    out = sd.generate(
        prompts,
        negative_prompt=negatives,
        height=16,
        width=24,
        steps=steps,
        guidance_scale=7.5,
        seed=[5, 6, 9],
        sampler=sampler,
        output="latent",
        progress=False,
    )
    error = relative_error(out.latents, expected)
    agrees("text to image, every sampler", "StableDiffusionPipeline", error, _TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(tmp_path, shape: str) -> None:
    pipeline = save_pipeline(shape, tmp_path)
    expected = pipeline(
        "a cat", num_inference_steps=20, guidance_scale=1.0, generator=_generators([3]), output_type="np"
    ).images
    out = engine.load(tmp_path).generate("a cat", steps=20, guidance_scale=1.0, seed=3, output="numpy", progress=False)
    assert np.abs(out.images - expected).max() <= 1e-3
    assert out.images.shape == expected.shape


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_guidance_rescale(both, rescale: float, agrees) -> None:
    pipeline, sd = both
    _use(pipeline, "ddim")
    options = {"guidance_scale": 7.5, "guidance_rescale": rescale}
    prompts = ["a red cat", "a dog on a beach"]
    expected = pipeline(
        prompts, num_inference_steps=6, generator=_generators([1, 2]), output_type="latent", **options
    ).images
    out = sd.generate(prompts, steps=6, seed=1, output="latent", progress=False, **options)
    agrees("`guidance_rescale`", "StableDiffusionPipeline", relative_error(out.latents, expected), _TOLERANCE)
    plain = sd.generate(prompts, steps=6, seed=1, guidance_scale=7.5, output="latent", progress=False)
    assert relative_error(plain.latents, expected) > 1e-3


def test_zero_terminal_snr(tmp_path) -> None:
    """A model of v-prediction from no signal, as SD 2.1's fine-tunes have it, on its own scheduler file."""
    pipeline = save_pipeline("narrow", tmp_path)
    config = {
        **SD_V1_5_SCHEDULER,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(config)
    options = {"guidance_scale": 7.5, "guidance_rescale": 0.7}
    expected = pipeline(
        "a cat", num_inference_steps=6, generator=_generators([1]), output_type="latent", **options
    ).images
    sd = engine.load(tmp_path)
    out = sd.generate("a cat", steps=6, seed=1, output="latent", progress=False, **options)
    assert relative_error(out.latents, expected) <= _TOLERANCE


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_eta(both, eta: float) -> None:
    pipeline, sd = both
    _use(pipeline, "ddim")
    expected = pipeline(
        ["a cat"] * 2, num_inference_steps=6, eta=eta, generator=_generators([1, 2]), output_type="latent"
    ).images
    out = sd.generate(
        "a cat", images_per_prompt=2, steps=6, guidance_scale=7.5, eta=eta, seed=1, output="latent", progress=False
    )
    assert relative_error(out.latents, expected) <= _TOLERANCE


@pytest.mark.parametrize("sampler", _SAMPLERS)
@pytest.mark.parametrize("strength", [0.35, 1.0])
def test_image_to_image(both, sampler: str, strength: float, agrees) -> None:
    pipeline, sd = both
    _use(pipeline, sampler)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    image_pipeline = diffusers.StableDiffusionImg2ImgPipeline(
        **{name: getattr(pipeline, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")},
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    image_pipeline.set_progress_bar_config(disable=True)
    expected = image_pipeline(
        ["a red cat", "a dog"],
        image=[Image.fromarray(pixels)] * 2,
        strength=strength,
        num_inference_steps=10,
        guidance_scale=5.0,
        generator=_generators([3, 4]),
        output_type="latent",
    ).images
    out = sd.generate(
        ["a red cat", "a dog"],
        image=Image.fromarray(pixels),
        strength=strength,
        steps=10,
        guidance_scale=5.0,
        seed=3,
        sampler=sampler,
        output="latent",
        progress=False,
    )
    error = relative_error(out.latents, expected)
    agrees("image to image, every sampler", "StableDiffusionImg2ImgPipeline", error, _TOLERANCE)
