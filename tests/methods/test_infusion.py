"""Infusion's strength: a factor on what a concept adds."""

from dataclasses import replace

import pytest
import torch

import engine
from engine.methods.infusion import residual_widths


@pytest.fixture(scope="module")
def sd() -> engine.Engine:
    return engine.load(backend="torch")


@pytest.fixture(scope="module")
def concepts(sd: engine.Engine) -> list[engine.Concept]:
    generator = torch.Generator().manual_seed(0)
    widths = residual_widths(sd.unet, "text")
    return [
        engine.Concept(noun, {name: torch.randn(n, generator=generator) for name, n in widths.items()})
        for noun in ("cat", "boat")
    ]


def _draw(sd: engine.Engine, custom: engine.Infusion) -> torch.Tensor:
    prompt = "a photo of a cat and a boat on a beach"
    return sd.generate(prompt, steps=3, seed=1, customization=custom, output="latent", progress=False).images


def test_strength_is_a_factor_on_each_concepts_residuals(sd: engine.Engine, concepts: list[engine.Concept]) -> None:
    scaled = [
        replace(concept, residuals={name: factor * residual for name, residual in concept.residuals.items()})
        for concept, factor in zip(concepts, (0.25, -2.0), strict=True)
    ]
    found = _draw(sd, engine.Infusion(concepts, strength=[0.25, -2.0]))
    torch.testing.assert_close(found, _draw(sd, engine.Infusion(scaled)), rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, _draw(sd, engine.Infusion(concepts)))


def test_strength_0_is_the_foundation_and_1_the_default(sd: engine.Engine, concepts: list[engine.Concept]) -> None:
    off = sd.generate(
        "a cat",
        steps=2,
        seed=1,
        customization=engine.Infusion(concepts[:1], strength=0),
        output="numpy",
        progress=False,
    )
    assert (off.images == off.foundation_images[0]).all()
    assert torch.equal(_draw(sd, engine.Infusion(concepts, strength=1)), _draw(sd, engine.Infusion(concepts)))


def test_strength_is_told_in_the_settings(concepts: list[engine.Concept]) -> None:
    assert engine.Infusion(concepts, strength=0.5).settings()["strength"] == [0.5, 0.5]
    assert engine.Infusion(concepts, strength=(0.5, 2)).settings()["strength"] == [0.5, 2]


@pytest.mark.parametrize("strength", [[1.0], [], float("nan"), "1", True, [1.0, None]])
def test_strength_that_fits_nothing_is_refused(concepts: list[engine.Concept], strength: object) -> None:
    with pytest.raises(ValueError, match="strength must be"):
        engine.Infusion(concepts, strength=strength)  # type: ignore[arg-type]
