"""Inpainting: what is kept is the picture's own, whatever draws beside it, and what is drawn differs."""

from typing import Any

import numpy as np
import pytest
import torch

import engine
from engine.sampling.samplers import SAMPLERS, make_table
from tests.loras import write_kohya
from tests.pipelines import random_concept

_PIXELS = np.random.default_rng(0).random((16, 24, 3)).astype(np.float32)
_MASK = np.zeros((16, 24), np.float32)
_MASK[4:12, 6:18] = 1
_QUICK = {"steps": 4, "seed": 3, "output": "latent", "progress": False, "image": _PIXELS}


def _kept(latents: torch.Tensor) -> torch.Tensor:
    return latents[..., torch.from_numpy(_MASK[::2, ::2] == 0)]


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_kept_is_the_pictures_own(small: engine.Engine, sampler: str, strength: float) -> None:
    """To the bit at the end, though not on the way."""
    on_the_way: list[torch.Tensor] = []
    options = {**_QUICK, "strength": strength, "sampler": sampler}
    out = small.generate("a cat", mask=_MASK, callback=lambda _i, _n, x: on_the_way.append(x.clone()), **options)
    mean, std = small.vae.posterior(torch.from_numpy(_PIXELS).permute(2, 0, 1)[None].mul(255).round().div(127.5) - 1)
    noise = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(3))
    clean = (mean + std * noise) * small.vae.config.scaling_factor
    assert torch.allclose(_kept(out.latents), _kept(clean), atol=1e-5)
    assert not torch.allclose(_kept(on_the_way[0]), _kept(clean), atol=1e-2)
    assert (out.latents - clean)[..., 4, 5].abs().max() > 1e-2


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("begin", [0, 2])
def test_kept_levels_are_where_the_next_step_looks(small: engine.Engine, sampler: str, begin: int) -> None:
    """The scale of the UNet's input at the next step makes variance-preserving latents of what is kept."""
    table = make_table(sampler, small.schedule, 6, begin=begin)
    columns = table.coefficients
    assert (float(columns.keep_scale[-1]), float(columns.keep_noise[-1])) == (1.0, 0.0)
    alpha, sigma = (columns.input_scale[1:] * one[:-1] for one in (columns.keep_scale, columns.keep_noise))
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(len(table) - 1), atol=1e-5)
    later = make_table(sampler, small.schedule, 6, begin=begin + 1)
    n = len(table) - len(later)
    assert float(columns.keep_scale[n - 1]) == pytest.approx(later.image_scale)
    assert float(columns.keep_noise[n - 1]) == pytest.approx(later.image_noise)


@pytest.mark.parametrize("model", ["small", "inpainting"])
def test_customisations_draw_within_the_mask(request: pytest.FixtureRequest, model: str) -> None:
    """Each kind draws another thing there than the model itself, from the same start."""
    sd: engine.Engine = request.getfixturevalue(model)
    concept = random_concept(sd)
    kinds: dict[str, Any] = {
        "infusion": engine.Infusion([concept]),
        "shared": engine.Infusion([concept], foundation="shared"),
        "dci": engine.DCI("cat", "dog", fraction=1.0),
        "dci, own noise": engine.DCI("cat", "dog", fraction=1.0, noise="independent"),
    }
    options = {**_QUICK, "mask": _MASK, "strength": 0.9}
    plain = sd.generate("a cat", **options).latents
    for name, custom in kinds.items():
        out = sd.generate("a cat", customization=custom, **options)
        assert (out.latents - plain).abs().max() > 1e-3, name
        if model == "small":
            assert torch.allclose(_kept(out.latents), _kept(plain), atol=1e-5), name
        if name == "infusion":
            assert out.foundation_images is not None
            assert torch.allclose(out.foundation_images[0], plain[0], atol=1e-4)


def test_soft_masks_blend(small: engine.Engine) -> None:
    """Halfway between what is kept and what is drawn at the last step: it lies between hard masks there."""
    options = {**_QUICK, "strength": 0.9}
    blurred = small.generate("a cat", mask=_MASK, mask_blur=2.0, **options).latents
    hard = small.generate("a cat", mask=_MASK, **options).latents
    assert (blurred - hard).abs().max() > 1e-2
    last: list[torch.Tensor] = []
    grey = np.full((16, 24), 128, np.uint8)
    out = small.generate("a cat", mask=grey, callback=lambda _i, _n, x: last.append(x.clone()), **options).latents
    assert torch.equal(out, last[-1])
    assert not torch.equal(out, small.generate("a cat", mask=grey * 0 + 255, **options).latents)


def test_inpainting_models_see_masks_cut_at_one_half(inpainting: engine.Engine) -> None:
    options = {**_QUICK, "strength": 1.0}
    hard, soft, other = (
        inpainting.generate("a cat", mask=mask, **options).latents for mask in (_MASK, _MASK * 0.6, 1 - _MASK)
    )
    assert torch.equal(hard, soft)
    assert not torch.equal(hard, other)


def test_loras_of_an_inpainting_model(inpainting: engine.Engine, tmp_path: Any) -> None:
    lace = inpainting.with_loras([engine.LoRA(write_kohya(inpainting, tmp_path / "lace.safetensors"))])
    assert lace.limits.takes_masks
    ours, theirs = (sd.generate("a cat", mask=_MASK, **_QUICK).latents for sd in (lace, inpainting))
    assert not torch.equal(ours, theirs)


def test_pictures_do_not_depend_on_their_batch(small: engine.Engine) -> None:
    masks, options = [_MASK, 1 - _MASK], _QUICK | {"strength": 1.0, "sampler": "euler_ancestral"}
    both = small.generate(["a cat", "a dog"], mask=masks, **options).latents
    alone = small.generate("a dog", mask=masks[1], **{**options, "seed": 4}).latents
    assert torch.allclose(both[1:], alone, atol=1e-5)
