"""The embedded model: small enough to ship, the same through diffusers, and it draws what it is asked for."""

import threading
import warnings
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import engine
from benchmarks.tinyworld.captions import full_prompt
from benchmarks.tinyworld.data import HELD_OUT_SEED, scene_at, to_tensor
from benchmarks.tinyworld.evaluate import score
from engine.evaluate.tinyworld import load_evaluator
from engine.weights.checkpoint import ASSETS, EMBEDDED_MODEL
from tests.pipelines import relative_error


@pytest.fixture(scope="module")
def tiny() -> engine.Engine:
    return engine.load()


def test_sizes() -> None:
    sizes = {path: path.stat().st_size for path in EMBEDDED_MODEL.rglob("*.safetensors")}
    assert sum(sizes.values()) <= 16_000_000
    assert max(sizes.values()) <= 15_000_000


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m_karras"])
def test_the_same_through_diffusers(tiny: engine.Engine, sampler: str) -> None:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        EMBEDDED_MODEL, torch_dtype=torch.float32, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    if sampler == "dpmpp_2m_karras":
        pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
            pipeline.scheduler.config, use_karras_sigmas=True, timestep_spacing="leading"
        )
    prompt = "a photo of a red cat on a beach"
    expected = pipeline(
        prompt,
        num_inference_steps=20,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
    ).images
    out = tiny.generate(prompt, steps=20, guidance_scale=4.0, seed=7, sampler=sampler, output="numpy", progress=False)
    assert relative_error(torch.from_numpy(out.images), torch.from_numpy(expected)) <= 2e-4


def test_generate_without_a_model(tiny: engine.Engine) -> None:
    results: list[engine.Result] = []
    threads = [
        threading.Thread(target=lambda: results.append(engine.generate("a blue car", seed=3, steps=2, progress=False)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = tiny.generate("a blue car", seed=3, steps=2, progress=False)
    assert expected.images[0].size == (128, 128)
    for result in results:
        difference = np.asarray(result.images[0]).astype(int) - np.asarray(expected.images[0]).astype(int)
        assert len(results) == 3
        assert np.abs(difference).max() <= 1


def test_it_draws_what_it_is_asked_for(tiny: engine.Engine) -> None:
    """At least 10 of 12 fresh prompts; how well exactly is what the evaluation measures."""
    scenes = [scene_at(i, HELD_OUT_SEED) for i in range(30_000, 30_012)]
    prompts = [full_prompt(scene) for scene in scenes]
    images = tiny.generate(prompts, steps=15, guidance_scale=4.0, seed=0, progress=False).images
    right = score(to_tensor(images), scenes, load_evaluator())
    for name in ("object", "colour", "background"):
        assert sum(right[name]) >= 10, name


def test_words_attend_to_their_things(tiny: engine.Engine) -> None:
    """Where the picture is red, the car's map is high: Infusion and DCI rest on this."""
    options = {"steps": 15, "guidance_scale": 4.0, "seed": 1, "attention_words": ["car"], "progress": False}
    out = tiny.generate("a photo of a red car in the snow", **options)
    picture = np.asarray(out.images[0].resize((16, 16), Image.Resampling.BOX)).astype(float)
    red = picture[..., 0] - picture[..., 1:].mean(axis=-1) > 60
    assert out.attention is not None
    heat = out.attention.heat_map("car")
    assert 5 < red.sum() < 120
    assert heat[red].mean() > 3 * heat[~red].mean()


@pytest.mark.parametrize("path", sorted((ASSETS / "concepts").glob("*.safetensors")), ids=lambda path: path.stem)
def test_shipped_concepts_fit_the_model(tiny: engine.Engine, path: Path) -> None:
    concept = engine.Concept.load(path)
    custom = engine.Infusion([concept])
    options = {"steps": 2, "seed": 0, "output": "latent", "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one of another model would warn
        out = tiny.generate(f"a {concept.noun} on a beach", customization=custom, **options)
    assert not torch.equal(out.images[0], out.foundation_images[0])
