"""Start noise: variations as A1111 has them, and generators as diffusers has them."""

import numpy as np
import pytest
import torch
from PIL import Image

import engine
from engine.sampling.seeds import between
from tests.naming import short

_QUICK = {"steps": 3, "output": "latent", "progress": False}


def _noise(seed: int) -> torch.Tensor:
    return torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed))


def _arc(x: np.ndarray, y: np.ndarray, share: float) -> np.ndarray:
    """Column by column, in float64."""
    out = np.empty_like(x)
    for channel in range(x.shape[0]):
        for column in range(x.shape[2]):
            a, b = x[channel, :, column], y[channel, :, column]
            angle = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            out[channel, :, column] = (np.sin((1 - share) * angle) * a + np.sin(share * angle) * b) / np.sin(angle)
    return out


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_between(share: float) -> None:
    one, other = _noise(1), _noise(2)
    expected = _arc(one.double().numpy(), other.double().numpy(), share)
    np.testing.assert_allclose(between(one, other, share).numpy(), expected, rtol=0, atol=2e-5)
    assert abs(float(between(one, other, share).std()) - 1) < 0.1, "as strong as noise is"
    assert torch.equal(between(one, one, share), one), "no arc"
    torch.testing.assert_close(between(one, -one, 0.25), one / 2)


def test_a_variation_is_what_a1111_draws(small: engine.Engine) -> None:
    """One seed for all images, whose noise moves towards seeds that are counted up."""
    out = small.generate(
        "a cat", images_per_prompt=3, seed=5, variation_seed=20, variation_strength=0.3, sampler="ddim", **_QUICK
    )
    assert out.seeds == [5, 5, 5]
    assert out.settings["variation_seeds"] == [20, 21, 22]
    assert out.settings["variation_strength"] == 0.3
    for i, seed in enumerate((20, 21, 22)):
        latents = between(_noise(5), _noise(seed), 0.3)[None]
        expected = small.generate("a cat", latents=latents, seed=0, sampler="ddim", **_QUICK).latents
        torch.testing.assert_close(out.latents[i : i + 1], expected, rtol=1e-5, atol=1e-5)
    whole = small.generate("a cat", seed=5, variation_seed=20, variation_strength=1.0, **_QUICK).latents
    torch.testing.assert_close(whole, small.generate("a cat", seed=20, **_QUICK).latents, rtol=1e-4, atol=1e-4)


def test_later_noise_is_the_seeds_own(small: engine.Engine) -> None:
    """As A1111 goes on with the seed's generator, the variation's being for the start alone."""
    options = _QUICK | {"sampler": "euler_ancestral", "steps": 2}
    out = small.generate("a cat", seed=5, variation_seed=9, variation_strength=0.5, **options)
    generator = torch.Generator().manual_seed(5)
    start = between(torch.randn(4, 8, 8, generator=generator), _noise(9), 0.5)[None]
    expected = small.generate("a cat", latents=start, generator=generator, **options).latents
    torch.testing.assert_close(out.latents, expected, rtol=1e-5, atol=1e-5)


def test_variations_from_a_picture(small: engine.Engine) -> None:
    """The variation is of the noise on the picture, not of its encoding."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    given = {"image": picture, "strength": 0.99, **_QUICK, "sampler": "euler"}
    plain, none, some = (
        small.generate("a cat", seed=5, **given, **more).latents
        for more in ({}, {"variation_strength": 0.0}, {"variation_strength": 1e-6, "variation_seed": 4})
    )
    assert torch.equal(plain, none)
    torch.testing.assert_close(some, plain, rtol=1e-4, atol=1e-4)
    moved = small.generate("a cat", seed=5, variation_strength=0.5, variation_seed=4, **given).latents
    assert float((moved - plain).norm() / plain.norm()) > 1e-2


def test_seeds_that_are_given_one_by_one_stay(small: engine.Engine) -> None:
    given = {"variation_seed": [7, 7], "variation_strength": 0.5, **_QUICK}
    out = small.generate(["a cat", "a dog"], seed=[1, 2], **given)
    assert (out.seeds, out.settings["variation_seeds"]) == ([1, 2], [7, 7])
    drawn = small.generate("a cat", images_per_prompt=2, variation_strength=0.5, **_QUICK)
    assert drawn.seeds[0] == drawn.seeds[1]
    first, second = drawn.settings["variation_seeds"]
    assert first != second
    again = small.generate(
        "a cat", images_per_prompt=2, seed=drawn.seeds, variation_seed=[first, second], variation_strength=0.5, **_QUICK
    )
    assert torch.equal(again.latents, drawn.latents)


def test_pictures_carry_their_variation(small: engine.Engine) -> None:
    out = small.generate("a cat", seed=3, steps=1, variation_seed=8, variation_strength=0.25, progress=False)
    assert "Variation seed: 8, Variation seed strength: 0.25" in out.parameters(0)
    assert "Variation" not in small.generate("a cat", seed=3, steps=1, progress=False).parameters(0)


def test_infusion_and_dci_vary(small: engine.Engine) -> None:
    """Images that differ in their variation alone share no foundation."""
    from tests.pipelines import random_concept

    infusion = engine.Infusion([random_concept(small)])
    for custom in (infusion, engine.DCI("cat", "dog", noise="independent", fraction=1.0)):
        given = {"customization": custom, "variation_strength": 0.5, "seed": 4, **_QUICK}
        together = small.generate("a cat", images_per_prompt=2, variation_seed=1, **given)
        for i in range(2):
            alone = small.generate("a cat", variation_seed=1 + i, **given)
            torch.testing.assert_close(together.latents[i], alone.latents[0], rtol=1e-4, atol=1e-4)
    foundations = small.generate(
        "a cat", images_per_prompt=2, customization=infusion, variation_strength=0.5, seed=4, **_QUICK
    ).foundation_images
    assert foundations is not None
    assert not torch.equal(foundations[0], foundations[1])


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral"])
def test_generators(small: engine.Engine, sampler: str) -> None:
    options = _QUICK | {"sampler": sampler}
    fresh = [torch.Generator().manual_seed(seed) for seed in (4, 9)]
    out = small.generate(["a cat", "a dog"], generator=fresh, **options)
    assert out.seeds == [4, 9]
    assert torch.equal(out.latents, small.generate(["a cat", "a dog"], seed=[4, 9], **options).latents)
    assert out.settings["given_generators"]
    on = small.generate(["a cat", "a dog"], generator=fresh, **options)
    assert not torch.equal(on.latents, out.latents), "they go on"
    lone = torch.Generator().manual_seed(4)
    both = small.generate(["a cat", "a dog"], generator=lone, **options)
    drawn = torch.Generator().manual_seed(4)
    start = torch.randn(2, 4, 8, 8, generator=drawn)
    expected = small.generate(["a cat", "a dog"], latents=start, generator=drawn, **options)
    assert torch.equal(both.latents, expected.latents)
    assert both.seeds == [4, 4]
    alike = small.generate("a cat", images_per_prompt=2, generator=torch.Generator().manual_seed(4), **options).latents
    assert not torch.equal(alike[0], alike[1]), "one seed, but two starts"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variation_seed": 3}, "variation_seed needs a variation_strength above 0, got variation_seed=3"),
        ({"variation_strength": 1.5}, "variation_strength must be a finite number from 0 to 1, got 1.5"),
        ({"variation_strength": 0.5, "variation_seed": -1}, "variation_seed must be an integer >= 0, got -1"),
        ({"variation_strength": 0.5, "variation_seed": [1, 2]}, "variation_seed must be one integer or one per image"),
        ({"variation_strength": 0.5, "latents": torch.zeros(1, 4, 8, 8)}, "it does not go with latents, got 0.5"),
        ({"variation_strength": 0.5, "generator": torch.Generator()}, "it does not go with generator, got 0.5"),
        ({"generator": torch.Generator(), "seed": 3}, "give seed or generator, not both"),
        ({"generator": 3}, "generator must be one torch.Generator, or one per image (1), got 3"),
        ({"generator": [torch.Generator()] * 2}, "generator must be one torch.Generator, or one per image (1)"),
        ({"generator": [torch.Generator(), 3], "images_per_prompt": 2}, "generator must be one torch.Generator"),
    ],
    ids=short,
)
def test_refusals(small: engine.Engine, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        small.generate("a cat", **_QUICK, **arguments)
    assert message in str(caught.value)
