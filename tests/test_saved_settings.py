"""Settings go into a picture and come out of it."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import engine
from tests.loras import write_kohya
from tests.parity.test_ico import _concept as ico_concept
from tests.pipelines import random_concept


def _png(path: Path, text: str, key: str = "parameters") -> Path:
    info = PngInfo()
    info.add_itxt(key, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """The arguments, and the warning, of which there is at most one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = engine.read_settings(path)
    assert len(caught) <= 1
    assert all(Path(one.filename) == Path(__file__) for one in caught), "it points at the caller"
    return found, "".join(str(one.message) for one in caught)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampler": "dpmpp_2m", "schedule": "karras", "guidance_scale": 6.5, "negative_prompt": "dark, (red:1.3)"},
        {"sampler": "ddim", "eta": 0.5, "height": 12, "width": 20, "guidance_rescale": 0.5},
        {"weighting": "comfyui", "vae_slicing": True},
        {"variation_seed": 4, "variation_strength": 0.25},
        {"upscale": 1.5, "upscale_strength": 0.75, "upscale_steps": 5},
        {"customization": engine.DCI("cat", "dog", strength=0.5, fraction=0.5, guidance="own")},
        {"customization": engine.DCI("cat", "dog", fraction=0.5, match_cost=True), "steps": 6},
    ],
    ids=lambda value: ",".join(value) or "none",
)
def test_a_picture_is_drawn_again_from_its_own_settings(small: engine.Engine, tmp_path: Path, options: dict) -> None:
    out = small.generate("a (cat:1.2), on\na beach", seed=7, **{"steps": 3, "progress": False, **options})
    (path,) = out.save(tmp_path)
    settings, warned = _read(path)
    assert warned == ""
    assert {"prompt", "seed", "steps", "sampler"} <= settings.keys()
    again = small.generate(**settings, progress=False)
    assert np.array_equal(np.asarray(again.images[0]), np.asarray(out.images[0]))
    assert again.settings.keys() == out.settings.keys()


def test_what_a_picture_does_not_hold_is_told(small: engine.Engine, tmp_path: Path) -> None:
    lace = small.with_loras([engine.LoRA(write_kohya(small, tmp_path / "lace.safetensors"))])
    for i, (sd, options, message) in enumerate((
        (small, {"image": Image.new("RGB", (16, 16)), "strength": 0.5}, "the image it began with"),
        (lace, {}, "LoRAs lace"),
        (small, {"customization": engine.Infusion([random_concept(small)])}, "infusion of the concepts cat"),
        (small, {"customization": engine.DCI(ico_concept(small), "dog")}, "dci of the concepts"),
    )):  # fmt: skip
        prompt = f"a {ico_concept(small).placeholder}" if "dci" in message else "a cat"
        out = sd.generate(prompt, steps=2, seed=1, progress=False, **options)
        settings, warned = _read(out.save(tmp_path / str(i))[0])
        assert message in warned
        assert "customization" not in settings
        assert settings.get("strength") == options.get("strength")


def test_a1111s_text(tmp_path: Path) -> None:
    text = (
        "a cat, (red:1.2)\nin the snow <lora:lace:0.8>\nNegative prompt: dark,\nblurry\n"
        "Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 1234, Size: 512x768, "
        'Model hash: abc, Model: sd15, VAE: x.pt, Clip skip: 2, Lora hashes: "lace: 1a, b: 2c", Variation seed: 9, '
        "Variation seed strength: 0.1, Version: v1.10.1"
    )
    settings, warned = _read(_png(tmp_path / "a.png", text))
    known = {
        "prompt": "a cat, (red:1.2)\nin the snow",
        "negative_prompt": "dark,\nblurry",
        "steps": 25,
        "sampler": "dpmpp_2m",
        "schedule": "karras",
        "guidance_scale": 6.5,
        "seed": 1234,
        "width": 512,
        "height": 768,
        "variation_seed": 9,
        "variation_strength": 0.1,
    }
    skipped = settings.pop("clip_skip", None)
    assert settings == known
    assert skipped == 1 or "clip_skip: 1" in warned
    for part in ("<lora:lace:0.8>", "vae: x.pt", "lora hashes: lace: 1a, b: 2c"):
        assert part in warned
    assert "Model" not in warned
    assert "v1.10.1" not in warned


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        ("Sampler: DPM++ 2M Karras", {"sampler": "dpmpp_2m_karras"}),
        ("Sampler: DPM++ 2M SDE Karras", {"sampler": "dpmpp_2m_sde", "schedule": "karras"}),
        ("Sampler: DPM++ 2M SDE Exponential", {"sampler": "dpmpp_2m_sde", "schedule": "exponential"}),
        ("Sampler: Euler a", {"sampler": "euler_ancestral"}),
        ("Sampler: euler A, Schedule type: Automatic", {"sampler": "euler_ancestral"}),
        ("Sampler: DPM++ 2M, Schedule type: Automatic", {"sampler": "dpmpp_2m", "schedule": "karras"}),
        ("Sampler: DPM++ 2M SDE, Schedule type: Automatic", {"sampler": "dpmpp_2m_sde", "schedule": "exponential"}),
        ("Sampler: Heun, Schedule type: Uniform", {"sampler": "heun"}),
        ("Sampler: Euler, Schedule type: SGM Uniform", {"sampler": "euler", "schedule": "sgm_uniform"}),
        ("Sampler: LMS Karras", "sampler: LMS Karras"),
        ("Sampler: Euler, Schedule type: Turbo", "schedule type: Turbo"),
    ],
)
def test_a1111s_samplers(tmp_path: Path, sampler: str, expected: dict | str) -> None:
    settings, warned = _read(_png(tmp_path / "a.png", f"a cat\nSteps: 20, {sampler}, Seed: 1"))
    assert settings.pop("steps") == 20
    if isinstance(expected, str):
        assert expected in warned
    else:
        assert settings == {"prompt": "a cat", "seed": 1} | expected
        assert warned == ""


@pytest.mark.parametrize(
    ("text", "expected", "told"),
    [
        ("Steps: 20, Denoising strength: 0.4", {"strength": 0.4}, "the image it began with"),
        (
            "Steps: 20, Denoising strength: 0.4, Hires upscale: 2, Hires steps: 10, Hires upscaler: Latent",
            {"upscale": 2.0, "upscale_strength": 0.4, "upscale_steps": 25},
            "hires upscaler: Latent",
        ),
        (
            "Steps: 20, Denoising strength: 0.5, Hires upscale: 1.5, Hires upscaler: Lanczos",
            {"upscale": 1.5, "upscale_strength": 0.5, "upscale_steps": 40},
            "",
        ),
        (
            "Steps: 20, Denoising strength: 0.3, Hires upscale: 2, Hires steps: 10, Hires upscaler: Lanczos",
            {"upscale": 2.0, "upscale_strength": 0.3, "upscale_steps": 34},  # of which int(34 * 0.3) = 10 are taken
            "",
        ),
        ("Steps: 20, Denoising strength: much", {}, "denoising strength: much"),
        ("Steps: 20, CFG scale: high, Seed: x, Size: big", {}, "cfg scale: high; seed: x; size: big"),
        ("Steps: 20, Seed: 3, Seed resize from: -1x-1", {"seed": 3}, "seed resize from: -1x-1"),
        ("Steps: 20, Clip skip: 1", {}, ""),
        ('Steps: 20, Template: "a, b: c"\nTemplate: d', {}, "template: a, b: c; Template: d"),
        ("", {}, ""),
    ],
)
def test_a1111s_other_fields(tmp_path: Path, text: str, expected: dict, told: str) -> None:
    settings, warned = _read(_png(tmp_path / "a.png", f"a cat: red, Steps and all\n{text}"))
    assert settings.pop("steps", 20) == 20
    assert settings == {"prompt": "a cat: red, Steps and all"} | expected
    assert told in warned
    assert bool(told) == bool(warned)


def test_what_we_write_for_a1111_we_read(small: engine.Engine, tmp_path: Path) -> None:
    options = {"sampler": "heun", "schedule": "exponential", "negative_prompt": "x, y: z", "height": 12, "width": 20}
    out = small.generate("a cat", seed=5, steps=4, upscale=1.5, upscale_steps=4, progress=False, **options)
    settings, warned = _read(_png(tmp_path / "a.png", out.parameters(0)))
    assert warned == ""
    again = small.generate(**settings, progress=False)
    assert np.array_equal(np.asarray(again.images[0]), np.asarray(out.images[0]))


def test_pictures_without_settings(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    for path, message in (
        (tmp_path / "plain.png", "must hold settings as PNG text, twinstream or parameters, got []"),
        (tmp_path / "text.png", "cannot be read as a picture"),
        (tmp_path / "none.png", "cannot be read as a picture"),
        (_png(tmp_path / "a.png", "{", "twinstream"), "its twinstream text must be settings as JSON"),
        (_png(tmp_path / "b.png", "[1]", "twinstream"), "its twinstream text must be settings as JSON"),
        (_png(tmp_path / "c.png", "{}", "twinstream"), "its twinstream text must be settings as JSON"),
    ):
        with pytest.raises(ValueError) as caught:
            engine.read_settings(path)
        assert message in str(caught.value)
