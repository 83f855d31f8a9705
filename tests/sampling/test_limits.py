"""What is refused before it can hurt: sizes, seeds, and requests that no memory holds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import engine
from engine.sampling import out_of_memory


def test_pictures_have_a_largest_size(small_folder: Path, small: engine.Engine) -> None:
    for size in ({"height": 2 * 10**6}, {"width": 4096 * 4096 // 16 + 2}):
        with pytest.raises(ValueError, match=r"at most 16777216 pixels \(max_pixels of engine.load\), got"):
            small.generate("a cat", **size)
    sd = engine.load(small_folder, max_pixels=16 * 12)
    with pytest.raises(ValueError, match=r"at most 192 pixels .*, got 16x14"):
        sd.generate("a cat", height=16, width=14)
    with pytest.raises(ValueError, match="at most 192 pixels"):
        sd.generate("a cat", latents=torch.zeros(1, 4, 8, 8))
    assert sd.generate("a cat", height=16, width=12, steps=1, progress=False).images[0].size == (12, 16)
    with pytest.raises(ValueError, match="max_pixels must be an integer >= 1, got 0"):
        engine.load(small_folder, max_pixels=0)


def test_what_no_memory_holds_is_refused_before_the_first_step(
    small: engine.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(engine.OutOfMemoryError, match=r"got 1000000000 of 16x16: at least .* GB free"):
        small.generate("a cat", images_per_prompt=10**9)
    monkeypatch.setattr(out_of_memory, "available_bytes", lambda _device: 66_000)
    with pytest.raises(engine.OutOfMemoryError, match="try vae_slicing=True"):
        small.generate("a cat", images_per_prompt=3, steps=1, progress=False)
    small.generate("a cat", images_per_prompt=3, steps=1, progress=False, vae_slicing=True)
    monkeypatch.setattr(out_of_memory, "available_bytes", lambda _device: None)  # where nothing tells
    small.generate("a cat", images_per_prompt=3, steps=1, progress=False)


def test_the_machine_tells_its_memory() -> None:
    available = out_of_memory.available_bytes(torch.device("cpu"))
    assert available is not None
    assert 1e7 < available < 1e14


def test_random_seeds_are_those_that_torch_tells_apart(small: engine.Engine) -> None:
    seeds = small.generate("a cat", images_per_prompt=8, steps=1, progress=False).seeds
    assert len(set(seeds)) == 8
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert max(seeds) >= 2**24


def test_a_picture_is_turned_as_its_exif_says(small: engine.Engine) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    upright = Image.fromarray(pixels)
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    stored.getexif()[0x0112] = 6  # turn a quarter to the right to see it upright
    options = {"seed": 1, "steps": 4, "strength": 0.5, "progress": False}
    turned, plain = (small.generate("a cat", image=picture, **options) for picture in (stored, upright))
    assert turned.images[0].size == (24, 16)
    assert torch.equal(turned.latents, plain.latents)
