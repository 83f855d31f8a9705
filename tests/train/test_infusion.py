"""Training of Infusion concepts: what gets gradients, what is resumed, what is refused."""

import json
import os
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import engine
from engine.train.infusion import InfusionObjective, InfusionOptions
from engine.train.loop import Terminated
from engine.train.pictures import Pictures


def _pictures(count: int = 3) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (20, 16, 3), np.uint8)) for _ in range(count)]


def _train(sd: engine.Engine, **options) -> engine.Concept:
    settings = {"steps": 4, "batch_size": 2, "progress": False} | options
    return engine.train_infusion(sd, settings.pop("images", _pictures()), "cat", **settings)


def _objective(sd: engine.Engine, **changes) -> InfusionObjective:
    options = {"batch_size": 3, "templates": ("a photo of a {}",)} | changes
    return InfusionObjective(sd, _pictures(), "cat", InfusionOptions(**options))


def _same(one: engine.Concept, other: engine.Concept) -> bool:
    return all(torch.equal(one.residuals[name], other.residuals[name]) for name in one.residuals)


@pytest.mark.parametrize("space", ["text", "value"])
def test_only_the_residuals_learn(small: engine.Engine, space: str) -> None:
    before = {name: weight.clone() for name, weight in small.unet.state_dict().items()}
    objective = _objective(small, space=space)
    first = objective.loss(0)
    first.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in objective.parameters.values())
    assert all(p.grad is None and not p.requires_grad for p in objective.unet.parameters())
    concept = _train(small, space=space, steps=30, learning_rate=0.5, batch_size=3)
    assert concept.space == space
    for name, weight in small.unet.state_dict().items():
        assert torch.equal(weight, before[name])
    with torch.no_grad():
        for name, parameter in objective.parameters.items():
            parameter.copy_(concept.residuals[name])
        untrained = _objective(small, space=space)
        parts = range(50, 60)
        assert sum(objective.loss(part) for part in parts) < sum(untrained.loss(part) for part in parts)


def test_the_gradient_is_the_slope(small: engine.Engine) -> None:
    objective = _objective(small)
    name, parameter = next(iter(objective.parameters.items()))
    objective.loss(0).backward()
    assert parameter.grad is not None
    slope, step = parameter.grad.clone(), 0.1
    direction = slope / slope.norm()
    with torch.no_grad():
        losses = []
        for sign in (1, -1):
            objective.parameters[name].copy_(sign * step * direction)
            losses.append(float(objective.loss(0)))
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(slope.norm()), rel=0.05)


def test_checkpointing_and_accumulation_change_nothing(small: engine.Engine) -> None:
    plain = _train(small, batch_size=4)
    recomputed = _train(small, batch_size=4, gradient_checkpointing=True)
    accumulated = _train(small, batch_size=2, accumulation_steps=2)
    for name, residual in plain.residuals.items():
        torch.testing.assert_close(recomputed.residuals[name], residual)
        assert accumulated.residuals[name].shape == residual.shape
    objective = _objective(small, batch_size=4)
    halves = _objective(small, batch_size=2)
    assert objective.pictures.batch(0, 0, 4).latents[2:].equal(halves.pictures.batch(0, 2, 2).latents)


def test_a_run_that_was_stopped_goes_on_to_the_bit(small: engine.Engine, tmp_path: Path) -> None:
    whole = _train(small, steps=6)
    for stop in (1, 3):
        _train(small, steps=6, folder=tmp_path, sample_every=0, callback=lambda step, total, loss, at=stop: step != at)
    resumed = _train(small, steps=6, folder=tmp_path, sample_every=3)
    assert _same(resumed, whole)
    assert sorted(path.name for path in tmp_path.glob("sample*")) == ["sample-000006.png"]
    assert Image.open(tmp_path / "sample-000006.png").size == (4 * 16, 2 * 16)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 6
    with pytest.raises(ValueError, match=r"written with learning_rate=0.01; .* got 0.02"):
        _train(small, steps=8, folder=tmp_path, learning_rate=0.02)


def test_sigterm_saves_and_exits(small: engine.Engine, tmp_path: Path) -> None:
    def terminate(step: int, total: int, loss: float) -> None:  # noqa: ARG001
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated) as caught:
        _train(small, steps=6, folder=tmp_path, sample_every=0, callback=terminate)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3
    assert _same(_train(small, steps=6, folder=tmp_path, sample_every=0), _train(small, steps=6))


def test_a_loss_that_is_not_finite_stops(small: engine.Engine, tmp_path: Path) -> None:
    with pytest.raises(engine.NonFiniteError, match=f"infinite at step .* the last good state is in {tmp_path}"):
        _train(small, learning_rate=1e36, folder=tmp_path, checkpoint_every=1, sample_every=0)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(torch.isfinite(parameter).all() for parameter in state["parameters"].values())


def test_masks_weight_the_loss(small: engine.Engine, tmp_path: Path) -> None:
    left = Image.fromarray(np.repeat(np.uint8([[255] * 8 + [0] * 8]), 20, axis=0))
    whole = Image.new("L", (16, 20), 255)
    full, none = _objective(small, masks=[whole] * 3), _objective(small)
    torch.testing.assert_close(full.loss(0), none.loss(0))
    half = _objective(small, masks=[left] * 3)
    assert not torch.isclose(half.loss(0), none.loss(0))
    for i in range(3):
        _pictures()[i].save(tmp_path / f"{i}.png")
    (tmp_path / "masks").mkdir()
    for i in range(2):
        left.save(tmp_path / "masks" / f"{i}.png")
    with pytest.raises(ValueError, match="lacks '2'"):
        _train(small, images=tmp_path, masks=tmp_path / "masks")
    with pytest.raises(ValueError, match="must mark something"):
        _train(small, masks=[left, left, Image.new("L", (16, 20))])


def test_pictures_from_files(small: engine.Engine, tmp_path: Path) -> None:
    wide = Image.new("RGB", (40, 16), "red")
    wide.paste("blue", (0, 0, 20, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    wide.save(tmp_path / "a.JPG", exif=exif, quality=95)
    wide.save(tmp_path / "b.webp")
    (tmp_path / "notes.txt").write_text("not a picture")
    pictures = Pictures(small, tmp_path, None, 16)
    assert pictures.n_pictures == 2
    turned = Pictures(small, [wide.rotate(-90, expand=True)], None, 16)
    torch.testing.assert_close(pictures.posteriors[0][0][:1], turned.posteriors[0][0], rtol=0.1, atol=0.1)
    seen = {int(i) for at in range(2) for i in [pictures.batch(0, at, 1).latents.sum() * 1000]}
    assert len(seen) == 2  # a round shows each picture once


def test_bad_arguments_are_refused(small: engine.Engine, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not a png")
    for options, message in (
        ({"images": []}, "images must be a folder of pictures or a non-empty list"),
        ({"images": tmp_path / "none"}, "images must be a folder of pictures or a list, got"),
        ({"images": tmp_path}, "broken.png: cannot be read as a picture"),
        ({"images": [3]}, "pictures must be files, PIL pictures or arrays, got 3"),
        ({"images": [Image.new("RGB", (9000, 8000))]}, "must have at most 64000000 pixels"),
        ({"steps": 0}, "steps must be an integer >= 1"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number"),
        ({"space": "key"}, "space must be one of text, value"),
        ({"size": 15}, "size must be a multiple of 2, got 15"),
        ({"templates": ["a photo"]}, "templates must be texts with one place"),
        ({"masks": [Image.new("L", (8, 8), 255)]}, r"masks must be one per picture \(3\), got 1"),
        ({"sample_prompts": ["a cat"]}, "sample_prompts needs a folder"),
        ({"sample_prompts": ["a dog"], "folder": tmp_path}, "must contain 'cat', got 'a dog'"),
        ({"checkpoint_every": 0}, "checkpoint_every must be an integer >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            _train(small, **options)


def test_losses_go_to_tensorboard_where_it_is_installed(
    small: engine.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, closed = [], []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert (Path(folder), purge_step) == (tmp_path, 0)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, step, round(value, 6)))

        def close(self) -> None:
            closed.append(True)

    module = types.ModuleType("tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    _train(small, steps=3, folder=tmp_path, sample_every=0)
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert written == [("loss", line["step"], line["loss"]) for line in logged]
    assert len(written) == 3
    assert closed == [True]


def test_a_noun_of_several_tokens_is_trained_at_its_last_or_at_all(small: engine.Engine) -> None:
    noun = "backpack toy"
    spans = small.text_encoder.tokenize(f"a photo of a {noun}").spans
    n_tokens = sum(start >= len("a photo of a") for start, _ in spans)
    assert n_tokens > 1
    for tokens, expected in (("last", [len(spans)]), ("all", list(range(len(spans) - n_tokens + 1, len(spans) + 1)))):
        options = InfusionOptions(templates=("a photo of a {}",), tokens=tokens)
        assert InfusionObjective(small, _pictures(), noun, options).positions.tolist() == [expected]


def test_defaults_are_the_papers() -> None:
    options = InfusionOptions()
    assert (options.steps, options.batch_size, options.learning_rate, options.space) == (500, 4, 0.01, "text")
