"""Training a ControlNet on outlines: what it starts from, that it learns, and what it leaves."""

from pathlib import Path

import diffusers
import pytest
import torch

import engine
from benchmarks.tinyworld.data import pictures_at
from benchmarks.tinyworld.train_controlnet import agreement, new_controlnet, outlines, save_controlnet, train


def test_outlines() -> None:
    picture = -torch.ones(1, 3, 8, 8)
    picture[:, 1, 2:5, 3:6] = 1.0
    edges = outlines(picture)
    assert edges[0, 0].nonzero().tolist() == [
        [1, 3], [1, 4], [1, 5], [2, 2], [2, 5], [3, 2], [3, 5], [4, 2], [4, 3], [4, 4], [4, 5]
    ]  # fmt: skip
    assert torch.equal(edges[:, 0], edges[:, 2])
    pictures = pictures_at(range(2))
    assert 0.01 < float(outlines(pictures).mean()) < 0.4


def test_agreement() -> None:
    picture, hints = -torch.ones(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)
    picture[..., 8:] = 1.0
    assert agreement(picture, outlines(picture)) == pytest.approx(1.0)
    hints[..., 9] = 1.0  # two pixels beside
    assert agreement(picture, hints) == pytest.approx(1.0)
    hints = torch.zeros(1, 3, 32, 32)
    hints[..., 10] = 1.0
    assert agreement(picture, hints) == pytest.approx(0.0)


def test_a_new_net_adds_nothing_and_diffusers_reads_it(tmp_path: Path) -> None:
    sd = engine.load(backend="torch")
    net = new_controlnet(sd.unet)
    save_controlnet(net, tmp_path / "net")
    loaded = engine.load_controlnet(tmp_path / "net", sd)
    options = {"seed": 0, "steps": 2, "output": "latent", "progress": False}
    hint = outlines(pictures_at(range(1)))[0].permute(1, 2, 0).numpy()
    plain, controlled = (
        sd.generate("a cat", control=control, **options).latents for control in ((), engine.Control(loaded, hint))
    )
    torch.testing.assert_close(controlled, plain, rtol=1e-5, atol=1e-5)
    theirs = diffusers.ControlNetModel.from_pretrained(tmp_path / "net")
    assert theirs.state_dict().keys() == net.state_dict().keys()


def test_two_steps_of_training(tmp_path: Path) -> None:
    train(tmp_path, minutes=5.0, batch=2, peak_rate=1e-3, grow=1, most_steps=2)
    assert (tmp_path / "outlines-000002.png").is_file()
    net = engine.load_controlnet(tmp_path / "net", engine.load(backend="torch"))
    assert net.controlnet_mid_block.weight.any()
    assert "edges_with" in (tmp_path / "controlnet.jsonl").read_text()
