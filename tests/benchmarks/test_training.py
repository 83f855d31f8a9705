"""Training runs stop and go on: checkpoints, averages and the growing store of latents."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.tinyworld.data import pictures_at, scene_at, to_images
from benchmarks.tinyworld.train_unet import LatentStore, training_attention
from benchmarks.tinyworld.train_vae import VAE_CONFIG
from benchmarks.tinyworld.training import EMA, Optimizer, Run
from engine.kernels.attention import attention_ref
from engine.models.config import VAEConfig
from engine.models.vae import AutoencoderKL


def _parts() -> tuple[torch.nn.Linear, dict]:
    model = torch.nn.Linear(3, 3)
    return model, {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), "ema": EMA(model, 0.9)}


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model, parts = _parts()
    run = Run(tmp_path, "x", minutes=10, parts=parts)
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        parts["optimizer"].step()
        parts["ema"].update(model)
        run.advance(8)
    run.save()
    again, again_parts = _parts()
    resumed = Run(tmp_path, "x", minutes=10, parts=again_parts)
    assert (resumed.step, resumed.samples) == (3, 24)
    assert resumed.seconds == pytest.approx(run.seconds)
    assert torch.equal(again.weight, model.weight)
    assert torch.equal(again_parts["ema"].shadow["weight"], parts["ema"].shadow["weight"])
    assert not list(tmp_path.glob("*.tmp"))


def test_the_rate_warms_up_and_falls(tmp_path: Path) -> None:
    run = Run(tmp_path, "x", minutes=1, parts={})
    rates = []
    for seconds in (0, 0.3, 0.6, 30, 60, 90):
        run.seconds = seconds
        rates.append(run.rate(1.0))
    assert rates[0] < rates[1] < rates[2]
    assert rates[3] == pytest.approx(0.505, abs=0.01)
    assert rates[4] == rates[5] == pytest.approx(0.01)


def test_averages_are_lent_and_taken_back() -> None:
    model = torch.nn.Linear(2, 2)
    ema = EMA(model, 0.5)
    own = model.weight.detach().clone()
    ema.shadow = {name: torch.zeros_like(value) for name, value in ema.shadow.items()}
    with ema.applied(model):
        assert not model.weight.any()
    assert torch.equal(model.weight, own)


def test_the_store_grows_and_is_found_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(VAEConfig.from_dict(VAE_CONFIG)).eval().requires_grad_(False)
    path = tmp_path / "latents"
    store = LatentStore(path)
    assert len(store) == 0
    store.grow(vae, 2)
    with path.open("ab") as file:
        file.write(b"torn")  # what a kill may leave
    again = LatentStore(path)
    assert len(again) == 2
    again.grow(vae, 3)
    assert len(again) == len(LatentStore(path)) == 5
    assert torch.equal(again.take([1, 4])[0][0], store.take([1])[0][0])
    latents, covered = again.take([4])
    expected = vae.encode(pictures_at(range(4, 5), patterned=True))
    torch.testing.assert_close(latents, expected, rtol=0.1, atol=0.1)  # encoded in bfloat16
    assert covered.shape == (1, 2, 16, 16)
    assert 0.05 < covered[0, 0].mean() < 0.6
    assert covered.max() == 1
    assert not covered[0, len(scene_at(4).things) :].any()


def test_one_step_is_muon_for_filters_and_adamw_for_the_rest() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 6, 3), torch.nn.GroupNorm(2, 6))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = Optimizer(model, weight_decay=0.0)
    model(torch.randn(2, 8, 5, 5)).square().mean().backward()
    optimizer.step(0.01)
    changes = [(p.detach() - was) for p, was in zip(model.parameters(), before, strict=True)]
    stretch = torch.linalg.svdvals(changes[0].flatten(1))
    assert stretch.min() > 0.5 * stretch.max()  # Muon's step is near an orthogonal matrix
    assert changes[2].abs().max() == pytest.approx(0.01, rel=0.01)  # AdamW's first step is the rate
    assert all(p.grad is None for p in model.parameters())


def test_training_attention_is_attention() -> None:
    q, k, v = torch.randn(2, 9, 12), torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    torch.testing.assert_close(training_attention(q, k, v, 3), attention_ref(q, k, v, 3))


def test_pictures_survive_the_round_trip() -> None:
    pictures = pictures_at(range(2))
    assert pictures.shape == (2, 3, 128, 128)
    assert np.array_equal(np.asarray(to_images(pictures)[1]), np.asarray(to_images(pictures_at(range(1, 2)))[0]))
