"""What a callback sees as the clean latents of a step is what the model predicted in it, for every sampler."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import engine
from benchmarks.systems import default_request
from engine.observe.progress import StageClock
from engine.sampling import step as step_module
from engine.sampling.samplers import SAMPLERS
from tests.pipelines import relative_error

_OPTIONS: dict[str, Any] = {"seed": 3, "steps": 5, "output": "latent", "progress": False}


def _watched(sd: engine.Engine, kind: str, **options: Any) -> list[torch.Tensor]:
    seen = []
    sd.generate(
        "a cat", callback=lambda _i, _n, latents: seen.append(latents.clone()), callback_latents=kind,
        **_OPTIONS | options,
    )  # fmt: skip
    return seen


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler(small: engine.Engine, sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step's own prediction is noted beside it."""
    predicted, real = [], step_module.step

    def noting(coefficients, x, noise_pred, position, history, noise=None):
        predicted.append((x, noise_pred, int(position[0])))
        return real(coefficients, x, noise_pred, position, history, noise)

    monkeypatch.setattr(step_module, "step", noting)
    seen = _watched(small, "clean", sampler=sampler)
    table = small.timetables(sampler, 5, 0.0, 0, None).table
    assert len(seen) == len(predicted) == len(table)
    for latents, (x, output, i) in zip(seen, predicted, strict=True):
        clean = table.clean[i, 0] * x + table.clean[i, 1] * output
        assert relative_error(latents, clean) <= 1e-3, f"step {i}"


def test_noisy_ones_are_as_they_were(small: engine.Engine) -> None:
    clean, noisy = (_watched(small, kind, sampler="euler") for kind in ("clean", "noisy"))
    out = small.generate("a cat", sampler="euler", **_OPTIONS)
    assert torch.equal(noisy[-1], out.latents)
    assert relative_error(clean[-1], out.latents) <= 1e-3, "Euler ends at what it predicts"
    assert relative_error(clean[0], noisy[0]) > 0.05


def test_through_phases_and_schedulers(small: engine.Engine) -> None:
    """Where DCI's auxiliary branch leaves, and where a scheduler draws."""
    options = {"customization": engine.DCI("cat", fraction=0.4), "images_per_prompt": 2}
    alone = _watched(small, "clean", **options)
    assert alone[0].shape[0] == alone[-1].shape[0] == 2
    with engine.Scheduler(small, max_rows=8) as scheduler:
        other = scheduler.submit("a boat", steps=5, seed=9, sampler="unipc")
        shared = _watched(small, "clean", scheduler=scheduler, **options)
        other.result()
    for one, same in zip(alone, shared, strict=True):
        assert relative_error(same, one) <= 1e-3


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "ddpm"])
@torch.no_grad()
def test_where_a_picture_is_kept(small: engine.Engine, sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture's own latents outside the mask, the prediction within, and both where it is soft."""
    predicted, real = [], step_module.step

    def noting(coefficients, x, noise_pred, position, history, noise=None):
        predicted.append((x, noise_pred))
        return real(coefficients, x, noise_pred, position, history, noise)

    monkeypatch.setattr(step_module, "step", noting)
    picture = np.random.default_rng(0).random((16, 16, 3)).astype(np.float32)
    mask = np.zeros((16, 16), np.float32)
    mask[:, 4:8], mask[:, 8:] = 0.3, 1.0
    options = {"image": picture, "mask": Image.fromarray((mask * 255).astype(np.uint8)), "strength": 0.9}
    options |= {"sampler": sampler, "callback_latents": "clean", "steps": 5, "seed": 3}
    one = small.begin(default_request(small, "a cat", **options), StageClock(small.device))
    kept, table, stepper = one.inpainting.kept, one.timetable.table, small.stepper()
    assert sorted(set(kept.mask.flatten().tolist())) == pytest.approx([0, 76 / 255, 1])
    while not one.is_done:
        stepper([one])
        x, output = predicted[-1]
        i = one.taken - 1
        clean = table.clean[i, 0] * x + table.clean[i, 1] * output
        assert relative_error(one.shown, kept.mask * clean + (1 - kept.mask) * kept.clean) <= 1e-3, f"step {i}"


def test_refusal(small: engine.Engine) -> None:
    with pytest.raises(ValueError, match="callback_latents must be one of noisy, clean, got 'x'"):
        small.generate("a cat", callback_latents="x")
