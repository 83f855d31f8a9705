"""What both trainers promise of a run: it resumes what it was, loses nothing, and its log is true."""

import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import engine
from engine.train.loop import run
from engine.train.options import TrainOptions
from engine.train.pictures import Pictures


def _pictures(seed: int = 0) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


def _train(sd: engine.Engine, folder: Path | None = None, **options: Any) -> engine.Concept:
    settings = {"images": _pictures(), "steps": 4, "batch_size": 2, "sample_every": 0, "progress": False} | options
    return engine.train_infusion(sd, settings.pop("images"), "cat", folder=folder, **settings)


def _steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_other_pictures_or_masks_of_the_same_count_are_refused(small: engine.Engine, tmp_path: Path) -> None:
    half = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 8, axis=1).repeat(16, axis=0))
    _train(small, tmp_path, steps=1)
    for other in ({"images": _pictures(1)}, {"images": _pictures()[::-1]}):
        with pytest.raises(ValueError, match="was written with pictures_hash="):
            _train(small, tmp_path, **other)
    _train(small, tmp_path)
    _train(small, tmp_path / "masked", masks=[half] * 3, steps=1)
    with pytest.raises(ValueError, match="was written with pictures_hash="):
        _train(small, tmp_path / "masked", masks=[half.transpose(Image.Transpose.FLIP_LEFT_RIGHT)] * 3)


def test_fewer_steps_than_were_taken_are_refused(small: engine.Engine, tmp_path: Path) -> None:
    whole = _train(small, tmp_path)
    with pytest.raises(ValueError, match=r"steps must be at least the 4 that .* has taken; .* got 3"):
        _train(small, tmp_path, steps=3)
    again = _train(small, tmp_path)
    assert all(torch.equal(again.residuals[name], residual) for name, residual in whole.residuals.items())


def test_a_log_repeats_no_step_after_a_crash(small: engine.Engine, tmp_path: Path) -> None:
    def crash(step: int, _total: int, _loss: float) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _train(small, tmp_path, steps=6, checkpoint_every=2, callback=crash)
    assert _steps(tmp_path) == [0, 1, 2, 3, 4]
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # cut short
    _train(small, tmp_path, steps=6, checkpoint_every=2)
    assert _steps(tmp_path) == [0, 1, 2, 3, 4, 5]


class _Objective:
    """One parameter; the loss of part ``bad`` is finite, and its gradient is not."""

    def __init__(self, bad: int) -> None:
        self.bad, self.parameters = bad, {"w": torch.nn.Parameter(torch.ones(2))}
        self.settings = {"method": "test"}
        self.losses: list[float] = []

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters.values(), lr=0.1)

    def loss(self, part: int) -> torch.Tensor:
        w = self.parameters["w"]
        if part == self.bad:
            return (w - w.detach()).abs().sqrt().sum()  # 0, with an infinite slope times 0
        return (part + 1) * w.sum()

    def sample(self) -> Any: ...


def _options(folder: Path | None, **options: Any) -> TrainOptions:
    return TrainOptions(**({"folder": folder, "progress": False, "sample_every": 0, "steps": 4} | options))


def test_gradients_that_are_not_finite_stop_before_they_spoil_anything(tmp_path: Path) -> None:
    objective = _Objective(bad=2)
    with pytest.raises(engine.NonFiniteError, match=rf"at step 2; the last good state is in {tmp_path}/checkpoint.pt"):
        run(objective, _options(tmp_path, checkpoint_every=1))
    assert torch.isfinite(objective.parameters["w"]).all()
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2
    assert torch.isfinite(state["parameters"]["w"]).all()


def test_where_nothing_is_kept_nothing_is_pointed_at(tmp_path: Path) -> None:
    with pytest.raises(engine.NonFiniteError, match=f"no checkpoint had been written to {tmp_path} yet"):
        run(_Objective(bad=0), _options(tmp_path))
    with pytest.raises(engine.NonFiniteError, match="no folder was given, so nothing is kept"):
        run(_Objective(bad=1), _options(None))


def test_accumulated_gradients_are_means() -> None:
    """Of parts with slopes 1 and 2, then 3 and 4."""
    objective = _Objective(bad=-1)
    seen = []
    run(objective, _options(None, steps=2, accumulation_steps=2, callback=lambda _i, _n, loss: seen.append(loss)))
    torch.testing.assert_close(objective.parameters["w"].detach(), torch.full((2,), 1 - 0.1 * 1.5 - 0.1 * 3.5))
    assert seen == pytest.approx([1.5 * 2, 3.5 * 2 * 0.85])


def test_a_mirrored_picture_has_a_mirrored_mask(small: engine.Engine) -> None:
    """The mask marks where the picture is bright, so that both can be told apart in every batch."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :8] = 255
    pictures = Pictures(small, [Image.fromarray(pixels)], [Image.fromarray(pixels[..., 0])], 16)
    (plain, _), (mirrored, _) = pictures.posteriors
    pictures.posteriors = [(mean, torch.zeros_like(mean)) for mean in (plain, mirrored)]
    sides = set()
    for position in range(16):
        batch = pictures.batch(0, position, 1)
        is_plain = torch.equal(batch.latents[0], plain[0])
        assert is_plain or torch.equal(batch.latents[0], mirrored[0])
        weights = batch.weights[0, 0]
        assert torch.equal(weights[:, :4], torch.full_like(weights[:, :4], float(is_plain)))
        assert torch.equal(weights[:, 4:], torch.full_like(weights[:, 4:], float(not is_plain)))
        sides.add(is_plain)
    assert sides == {True, False}


def test_the_context_has_a_rate_of_its_own(small: engine.Engine) -> None:
    from engine.train.ico import ICOObjective, ICOOptions

    options = ICOOptions(learning_rate=1e-3, context_learning_rate=2e-2, batch_size=3)
    objective = ICOObjective(small, _pictures(), "cat", options)
    rates = {id(p): group["lr"] for group in objective.optimizer().param_groups for p in group["params"]}
    for name, parameter in objective.parameters.items():
        assert rates[id(parameter)] == (2e-2 if name in ("before", "after") else 1e-3), name


def test_noise_is_that_of_the_schedule(small: engine.Engine) -> None:
    """``z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) eps``: of unit variance, and the noise can be taken out again."""
    from engine.train.denoising import Noiser

    noiser, clean = Noiser(small), torch.full((64, 4, 8, 8), 2.0)
    noised = noiser(clean, torch.Generator().manual_seed(0))
    bar = noiser.alphas_cumprod[noised.timesteps].double()[:, None, None, None]
    expected = bar.sqrt() * clean.double() + (1 - bar).sqrt() * noised.noise.double()
    torch.testing.assert_close(noised.latents.double(), expected, rtol=1e-5, atol=1e-5)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(noiser.alphas_cumprod.double(), torch.cumprod(1 - betas, 0), rtol=1e-4, atol=1e-6)
    assert noised.timesteps.unique().numel() > 50


def test_options_are_told_where_they_are_declared(small: engine.Engine) -> None:
    import inspect

    for function in (engine.train_infusion, engine.train_ico):
        parameters = inspect.signature(function).parameters
        assert {"steps", "learning_rate", "masks", "callback"} <= parameters.keys()
        assert "learning_rate: of AdamW" in " ".join(function.__doc__.split())
        with pytest.raises(TypeError, match="has no keyword 'learningrate'; did you mean"):
            function(small, _pictures(), "cat", learningrate=1)
    assert isinstance(engine.train_ico, types.FunctionType)
    assert inspect.signature(engine.train_infusion).parameters["learning_rate"].default == 0.01
    assert inspect.signature(engine.train_ico).parameters["learning_rate"].default == 6e-5
