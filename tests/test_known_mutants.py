"""Bugs that every other test once let pass, each put in on purpose: what they would have broken, from outside."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import engine
from tests.pipelines import random_concept, relative_error

_FAST = {"steps": 4, "output": "latent", "progress": False}
_FIXED = {"learning_rate": 0.0, "context_learning_rate": 0.0}


def _picture(seed: int, height: int = 16, width: int = 16) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _train(sd: engine.Engine, method: str = "infusion", **options) -> list[float]:
    """The loss of every step."""
    losses = list[float]()
    settings = {"images": [_picture(0), _picture(1)], "noun": "cat", "batch_size": 2, "progress": False} | options
    train = {"infusion": engine.train_infusion, "ico": engine.train_ico}[method]
    train(sd, settings.pop("images"), settings.pop("noun"), callback=lambda _, __, x: losses.append(x), **settings)
    return losses


@contextlib.contextmanager
def _watched(layer: nn.Conv2d) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What goes into and comes out of a layer, also in a copy of the model that shares its weights."""
    seen = list[tuple[Tensor, Tensor]]()

    def note(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        if isinstance(module, nn.Conv2d) and module.weight.data_ptr() == layer.weight.data_ptr():
            seen.append((inputs[0].detach().clone(), out.detach().clone()))

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def test_a_png_says_width_before_height(small: engine.Engine) -> None:
    out = small.generate("a cat", height=16, width=24, steps=1, seed=0, progress=False)
    assert out.images[0].size == (24, 16)
    assert "Size: 24x16," in out.parameters(0)


def test_images_of_one_prompt_stand_in_a_row(small: engine.Engine) -> None:
    prompts, negatives, pictures = ["a cat", "a red car"], ["x", "blurry"], [_picture(0), _picture(1)]
    out = small.generate(
        prompts, negative_prompt=negatives, image=pictures, images_per_prompt=2, seed=[3, 4, 5, 6], **_FAST
    )
    assert out.settings["prompts"] == ["a cat", "a cat", "a red car", "a red car"]
    assert out.settings["negative_prompts"] == ["x", "x", "blurry", "blurry"]
    for i in range(4):
        own = {"negative_prompt": negatives[i // 2], "image": pictures[i // 2], "seed": 3 + i}
        alone = small.generate(prompts[i // 2], **own, **_FAST)
        assert relative_error(out.latents[i : i + 1], alone.latents) <= 1e-5


@pytest.mark.parametrize("method", ["infusion", "ico"])
def test_training_noise_keeps_unit_variance(small_folder: Path, method: str) -> None:
    """Latents of unit variance stay so at every noise level: the weights of signal and noise are square roots."""
    sd = engine.load(small_folder)
    scale, layer = sd.vae.config.scaling_factor, sd.vae.quant_conv
    with torch.no_grad():
        layer.weight.zero_()  # a posterior of mean 0 and standard deviation 1 / scale
        layer.bias.copy_(torch.tensor([0.0] * 4 + [-2 * np.log(scale)] * 4))
    with _watched(sd.unet.conv_in) as seen:
        _train(sd, method, steps=4, batch_size=16)
    noisy = torch.cat([latents for latents, _ in seen])
    assert float(noisy.square().mean()) == pytest.approx(1.0, abs=0.04)  # 64 rows of 256 numbers


def test_a_mirrored_picture_has_a_mirrored_mask(small_folder: Path) -> None:
    sd = engine.load(small_folder)
    picture, mask = _picture(0), np.zeros((16, 16), dtype=np.uint8)
    mask[:, :6] = 255
    with torch.no_grad():
        sd.vae.quant_conv.weight[:4] *= 100  # latents beside which their noise is nothing
        sd.unet.conv_out.weight *= 1000  # a prediction beside which the noise it should be is nothing
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
        views = [sd.vae.encode(pixels).flatten(), sd.vae.encode(pixels.flip(-1)).flatten()]
    marked = torch.from_numpy(mask[::2, ::2]).float() / 255
    with _watched(sd.unet.conv_in) as latents, _watched(sd.unet.conv_out) as predictions:
        losses = _train(sd, "ico", images=[picture], masks=[mask], steps=8, batch_size=1, **_FIXED)
    is_mirrored = [
        bool(torch.cosine_similarity(z.flatten(), views[1], 0) > torch.cosine_similarity(z.flatten(), views[0], 0))
        for z, _ in latents
    ]
    assert set(is_mirrored) == {False, True}
    for mirrored, (_, predicted), loss in zip(is_mirrored, predictions, losses, strict=True):
        weights = marked.flip(-1) if mirrored else marked
        expected = (weights * predicted[0].square()).sum() / (4 * weights.sum())
        assert loss == pytest.approx(float(expected), rel=0.02)


def test_accumulated_losses_and_gradients_are_means(small: engine.Engine, tmp_path: Path) -> None:
    def first_moments(name: str, **options) -> tuple[list[float], list[Tensor]]:
        losses = _train(small, learning_rate=0.0, folder=tmp_path / name, sample_every=0, **options)
        state = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["optimizer"]["state"]
        return losses, [state[i]["exp_avg"] for i in sorted(state)]

    _, first = first_moments("first", steps=1)
    losses, both = first_moments("both", steps=2)
    (loss,), accumulated = first_moments("accumulated", steps=1, accumulation_steps=2)
    assert loss == pytest.approx(sum(losses) / 2, rel=1e-5)
    for moment, a, b in zip(accumulated, first, both, strict=True):  # AdamW: m_1 = g_1 / 10, m_2 = 0.9 m_1 + g_2 / 10
        torch.testing.assert_close(moment, (a + b - 0.9 * a) / 2, rtol=1e-4, atol=1e-7)


def test_contexts_learn_at_their_own_rate(small: engine.Engine, tmp_path: Path) -> None:
    def learned(rates: tuple[float, float]) -> dict[str, Tensor]:
        folder = tmp_path / f"{rates}"
        named = {"learning_rate": rates[0], "context_learning_rate": rates[1]}
        _train(small, "ico", steps=1, folder=folder, sample_every=0, **named)
        return torch.load(folder / "checkpoint.pt", weights_only=True)["parameters"]

    still, contexts, others = (learned(rates) for rates in ((0.0, 0.0), (0.0, 0.5), (0.5, 0.0)))
    for name, start in still.items():
        moved, fixed = (contexts, others) if name in ("before", "after") else (others, contexts)
        assert torch.equal(fixed[name], start), name
        assert float((moved[name] - start).abs().max()) == pytest.approx(0.5, rel=1e-2), name  # AdamW's first step


@pytest.mark.parametrize("kind", ["image", "latents"])
def test_other_starts_of_one_seed_are_other_pictures(small: engine.Engine, kind: str) -> None:
    noise = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    starts = [_picture(0, 16, 24), _picture(1, 16, 24)] if kind == "image" else noise.split(1)
    given = starts if kind == "image" else noise
    out = small.generate("a cat", images_per_prompt=2, seed=[5, 5], **{kind: given}, **_FAST)
    for i, start in enumerate(starts):
        alone = small.generate("a cat", seed=5, **{kind: start}, **_FAST)
        assert relative_error(out.latents[i : i + 1], alone.latents) <= 1e-5


@pytest.mark.parametrize("method", ["infusion", "dci"])
def test_a_callback_sees_the_pictures_latents_alone(small: engine.Engine, method: str) -> None:
    seen = list[Tensor]()
    custom = engine.Infusion([random_concept(small)]) if method == "infusion" else engine.DCI("cat", fraction=1.0)
    see = lambda _, __, latents: seen.append(latents.clone())  # noqa: E731
    out = small.generate("a cat", customization=[None, custom], images_per_prompt=2, seed=[1, 2], callback=see, **_FAST)
    assert [x.shape for x in seen] == [(2, 4, 8, 8)] * 4
    assert torch.equal(seen[-1], out.latents)


def test_mixing_steps_are_rounded(small: engine.Engine) -> None:
    def draw(fraction: float) -> Tensor:
        return small.generate("a cat", seed=0, customization=engine.DCI("cat", fraction=fraction), **_FAST).latents

    assert torch.equal(draw(0.4), draw(0.5))  # 1.6 and 2 of 4 steps
    assert torch.equal(draw(0.35), draw(0.25))  # 1.4 and 1
    assert not torch.equal(draw(0.25), draw(0.5))


def test_class_pictures_weigh_as_much_as_they_err(small_folder: Path) -> None:
    sd = engine.load(small_folder)
    with torch.no_grad():
        sd.unet.conv_out.weight *= 1000  # every squared error is far above one, whatever the latents
    plain, with_class = (
        _train(sd, "ico", steps=1, batch_size=4, prior_images=2, prior_weight=weight, **_FIXED)[0]
        for weight in (0.0, 1.0)
    )
    assert plain > 100
    assert with_class - plain == pytest.approx(plain, rel=0.5)
