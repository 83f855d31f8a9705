"""Saving pictures with their settings."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import engine
from engine.result import A1111_SAMPLERS, A1111_SCHEDULES
from engine.sampling.schedule import SCHEDULES


def test_png_metadata(small: engine.Engine, tmp_path: Path) -> None:
    out = small.generate(
        ["a (red:1.2) cat", "naïve 犬"],
        negative_prompt=["blurry", ""],
        steps=3,
        seed=[4, 9],
        sampler="dpmpp_2m_karras",
        guidance_scale=7.5,
        progress=False,
    )
    paths = out.save(tmp_path / "new")
    assert [path.name for path in paths] == ["00000-4.png", "00001-9.png"]
    first, second = (Image.open(path) for path in paths)
    assert first.text["parameters"] == (
        "a (red:1.2) cat\nNegative prompt: blurry\nSteps: 3, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 4, "
        f"Size: 16x16, Model: {small.name}, Version: twinstream {engine.__version__}"
    )
    settings = json.loads(second.text["twinstream"])
    assert (settings["prompt"], settings["negative_prompt"], settings["seed"]) == ("naïve 犬", "", 9)
    again = small.generate(
        settings["prompt"],
        steps=settings["steps"],
        seed=settings["seed"],
        sampler=settings["sampler"],
        guidance_scale=settings["guidance_scale"],
        progress=False,
    )
    assert np.abs(np.asarray(again.images[0]).astype(int) - np.asarray(second).astype(int)).max() <= 1


def test_nothing_is_overwritten(small: engine.Engine, tmp_path: Path) -> None:
    out = small.generate("a cat", seed=1, steps=1, output="numpy", progress=False)
    assert [out.save(tmp_path)[0].name for _ in range(3)] == ["00000-1.png", "00001-1.png", "00002-1.png"]
    (tmp_path / "00007-5.png").write_bytes(b"")
    assert out.save(tmp_path)[0].name == "00008-1.png"


def test_image_to_image_settings(small: engine.Engine) -> None:
    out = small.generate("a cat", image=Image.new("RGB", (16, 16)), steps=4, eta=0.5, seed=0, progress=False)
    assert "Denoising strength: 0.8, Eta DDIM: 0.5" in out.parameters(0)


def test_latents_are_not_pictures(small: engine.Engine, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="latents cannot be saved"):
        small.generate("a cat", steps=1, output="latent", progress=False).save(tmp_path)


def test_sizes_are_width_by_height(small: engine.Engine) -> None:
    out = small.generate("a cat", height=12, width=20, steps=1, seed=0, progress=False)
    assert "Size: 20x12, " in out.parameters(0)
    assert out.images[0].size == (20, 12)


def test_values_that_would_end_early_are_quoted_as_a1111_does(small: engine.Engine) -> None:
    out = small.generate("a cat", steps=1, seed=0, progress=False)
    named = replace(out, settings=out.settings | {"model": 'sd, 1.5: "mine"'})
    assert ', Model: "sd, 1.5: \\"mine\\"", Version: ' in named.parameters(0)


def test_results_can_be_compared(small: engine.Engine) -> None:
    one, other = (small.generate("a cat", steps=1, seed=0, output="numpy", progress=False) for _ in range(2))
    assert one == one  # noqa: PLR0124 (dataclasses compare arrays and fail)
    assert one != other


def test_every_sampler_and_schedule_has_a1111s_name(small: engine.Engine) -> None:
    out = small.generate("a cat", steps=2, seed=0, sampler="dpm2", schedule="karras", progress=False)
    assert "Steps: 2, Sampler: DPM2, Schedule type: Karras, CFG scale: 8, " in out.parameters(0)
    for sampler in engine.SAMPLERS:
        assert f"Sampler: {A1111_SAMPLERS[sampler]}, " in _with(out, sampler=sampler).parameters(0)
    for schedule in SCHEDULES:
        assert f"Schedule type: {A1111_SCHEDULES[schedule]}, " in _with(out, schedule=schedule).parameters(0)


def _with(out: engine.Result, **settings: str) -> engine.Result:
    return replace(out, settings=out.settings | settings)
