"""Fisher divergence against closed forms, and zero where a customisation does not act."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import engine
from engine.evaluate.divergence import Divergence, fisher_divergence, noise_predictor
from engine.methods.concept import Change
from engine.methods.infusion import residual_widths
from engine.sampling.schedule import alphas_cumprod

PROMPTS = ["a photo of a cat on a beach", "a photo of a red cat", "a sketch of a cat"]


@pytest.fixture(scope="module")
def sd() -> engine.Engine:
    return engine.load(backend="torch")


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def _nothing(_prompts: Sequence[str], latents: Tensor, _timesteps: Tensor) -> Tensor:
    return torch.zeros_like(latents)


def test_of_a_constant_difference_is_its_square(sd: engine.Engine, latents: Tensor) -> None:
    found = fisher_divergence(sd, _nothing, lambda p, z, t: torch.full_like(z, 0.5), latents, PROMPTS)
    assert found.mean == pytest.approx(0.25)
    assert found.total == pytest.approx(0.25 * 4 * 16 * 16)
    assert found.values == pytest.approx((256.0,) * 3)


def test_weights_are_the_noise_variances(sd: engine.Engine, latents: Tensor) -> None:
    alphas = torch.from_numpy(alphas_cumprod(sd.schedule))

    def deviation(_prompts: Sequence[str], latents: Tensor, timesteps: Tensor) -> Tensor:
        return (1 - alphas[timesteps]).sqrt().float()[:, None, None, None].expand_as(latents)

    found = fisher_divergence(sd, _nothing, deviation, latents, PROMPTS, repeats=5, batch_size=4)
    assert found.weighted == pytest.approx(4 * 16 * 16 / 2, rel=1e-5)  # sigma^2 / (2 sigma^2) per element


def test_both_models_see_noised_pictures_of_the_schedule(sd: engine.Engine, latents: Tensor) -> None:
    """E ||z_t||^2 = alpha_bar ||z||^2 + (1 - alpha_bar) d, over timesteps."""
    found = fisher_divergence(sd, _nothing, lambda p, z, t: z, 3 * latents, PROMPTS, repeats=400, batch_size=64)
    alpha = float(alphas_cumprod(sd.schedule).mean())
    expected = alpha * float((9 * latents.double().square()).flatten(1).sum(1).mean()) + (1 - alpha) * 1024
    assert found.total == pytest.approx(expected, rel=0.06)


def test_a_pair_has_its_own_noise_whatever_the_batch(sd: engine.Engine, latents: Tensor) -> None:
    one, other = (
        fisher_divergence(sd, _nothing, lambda p, z, t: z, latents, PROMPTS, repeats=2, batch_size=n) for n in (1, 6)
    )
    assert one.values == pytest.approx(other.values)
    assert fisher_divergence(sd, _nothing, lambda p, z, t: z, latents, PROMPTS, seed=1).values != one.values


def test_v_prediction_is_measured_as_noise(sd: engine.Engine, latents: Tensor) -> None:
    schedule = replace(sd.schedule, prediction_type="v_prediction")
    v_model = type("Model", (), {"schedule": schedule})()
    alphas = torch.from_numpy(alphas_cumprod(schedule))

    def v(_prompts: Sequence[str], latents: Tensor, timesteps: Tensor) -> Tensor:
        return (1 / alphas[timesteps]).sqrt().float()[:, None, None, None].expand_as(latents)

    assert fisher_divergence(v_model, _nothing, v, latents, PROMPTS).mean == pytest.approx(1.0, rel=1e-5)


def test_prediction_without_customisation_is_the_unets(sd: engine.Engine, latents: Tensor) -> None:
    timesteps = torch.tensor([10, 500, 990])
    found = noise_predictor(sd)(PROMPTS, latents, timesteps)
    with torch.no_grad():
        expected = sd.unet(latents, timesteps, sd.encode_prompt(PROMPTS))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_infusions_prediction_follows_the_foundation_at_the_same_latents(sd: engine.Engine, latents: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    residuals = {name: torch.randn(n, generator=generator) for name, n in residual_widths(sd.unet, "text").items()}
    timesteps = torch.tensor([10, 500, 990])
    concept = engine.Concept("cat", residuals)
    kinds = [engine.Infusion([concept], foundation=kind) for kind in ("parallel", "shared")]
    parallel, shared = (noise_predictor(sd, kind)(PROMPTS, latents, timesteps) for kind in kinds)
    torch.testing.assert_close(parallel, shared, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(parallel, noise_predictor(sd)(PROMPTS, latents, timesteps), atol=1e-2)
    off = engine.Infusion([concept], strength=0.0)
    torch.testing.assert_close(
        noise_predictor(sd, off)(PROMPTS, latents, timesteps), noise_predictor(sd)(PROMPTS, latents, timesteps)
    )


def test_changes_without_tokens_act_on_any_prompt(sd: engine.Engine, latents: Tensor) -> None:
    name = next(name for name in sd.unet.text_projections if name.endswith("to_v"))
    change = Change(0.1 * torch.ones_like(sd.unet.text_projections[name].weight))
    custom = noise_predictor(sd, engine.ICO([engine.Concept("cat", changes={name: change})]))
    found = fisher_divergence(sd, noise_predictor(sd), custom, latents, ["a photo of a boat"] * 3)
    assert found.total > 0
    same = fisher_divergence(sd, noise_predictor(sd), noise_predictor(sd), latents, ["a photo of a boat"] * 3)
    assert (same.total, same.mean, same.weighted) == (0, 0, 0)


def test_what_is_no_model_is_refused(sd: engine.Engine, latents: Tensor) -> None:
    with pytest.raises(ValueError, match="a way to draw, is not"):
        noise_predictor(sd, engine.DCI("cat"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one per latent"):
        fisher_divergence(sd, _nothing, _nothing, latents, PROMPTS[:2])


def test_a_record_has_an_interval_over_pairs() -> None:
    record = Divergence(2.0, 0.123456789, 8.0, (1.0, 3.0)).record()
    assert record == {"total": {"mean": 2.0, "interval": [1.0, 3.0], "n": 2}, "mean": 0.123457, "weighted": 8.0}
