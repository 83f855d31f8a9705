"""The page of combinations: what it trains is a LoRA that the engine takes, and every picture has all of its parts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import engine
from benchmarks.tinyworld import combined
from benchmarks.tinyworld.data import pictures_at
from benchmarks.tinyworld.train_controlnet import new_controlnet, save_controlnet


@pytest.fixture(scope="module")
def sd() -> engine.Engine:
    return engine.load(device="cpu", dtype="float32")


def test_ink_is_black_on_the_picture() -> None:
    plain = pictures_at(range(2))
    drawn = combined.inked(plain)
    is_ink = (drawn == -1).all(dim=1) & (plain != -1).any(dim=1)
    assert 0.02 < float(is_ink.float().mean()) < 0.6
    assert torch.equal(drawn.amax(dim=1)[~is_ink], plain.amax(dim=1)[~is_ink])


def test_the_lora_is_a_file_that_changes_the_model(sd: engine.Engine, tmp_path: Path) -> None:
    path = combined.train_lora(tmp_path / "lora.safetensors", steps=2)
    styled = sd.with_loras([engine.LoRA(path, 5.0)])
    options = {"seed": 0, "steps": 2, "output": "numpy", "progress": False}
    assert not np.array_equal(sd.generate("a cat", **options).images, styled.generate("a cat", **options).images)


def test_the_page_names_its_pictures(sd: engine.Engine, tmp_path: Path) -> None:
    net = new_controlnet(sd.unet)
    torch.nn.init.normal_(net.controlnet_mid_block.weight, std=0.1)
    save_controlnet(net, tmp_path / "net")
    concept = engine.train_ico(sd, [Image.new("RGB", (128, 128), "red")] * 2, noun="cat", steps=1, progress=False)
    rows = [
        combined.dci_and_long_prompt(sd, concept, steps=1),
        combined.control_ico_and_inpainting(sd, tmp_path / "net", concept, steps=1),
    ]
    assert [name for name, _ in rows[1]] == ["picture", "mask", "outlines", "without the net", "together"]
    picture, mask, _, free, drawn = (np.asarray(one).astype(int) for _, one in rows[1])
    kept = np.abs(picture - drawn).max(axis=-1)[mask[..., 0] == 0]
    assert np.median(kept) < 20, "what the mask leaves alone stays, but for the VAE"
    assert not np.array_equal(free, drawn)
    assert combined.page(rows).size == (5 * 136, 2 * 154)
