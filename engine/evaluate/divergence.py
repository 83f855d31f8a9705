"""Latent Fisher divergence between two models (Infusion, arXiv:2404.14007, definition 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine import Engine
from ..methods.concept_cache import Texts
from ..methods.dci import DCI
from ..models.conditioning import Conditioning
from ..sampling.arguments import Customization, Options
from ..sampling.plan import make_plans
from ..sampling.request import make_request
from ..sampling.schedule import alphas_cumprod
from ..sampling.seeds import make_generator
from .bootstrap import estimate

Predict = Callable[[Sequence[str], Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Divergence:
    """``E ||eps_1 - eps_2||^2`` over pairs of picture and prompt, timesteps and noise.

    Attributes:
        total: summed over a latent's elements.
        mean: per element.
        weighted: ``total`` with each summand over ``2 sigma_t^2``, ``sigma_t^2 = 1 - alpha_bar_t``: half the squared
            difference of scores.
        values: each pair's part of ``total``, in the pairs' order.
    """

    total: float
    mean: float
    weighted: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, sums: Tensor, n_elements: int) -> Divergence:
        """From what ``pair_sums`` gives for all pairs (2, n), and how many elements a latent has."""
        totals, weighted = sums
        total = float(totals.mean())
        return cls(total, total / n_elements, float(weighted.mean()), tuple(totals.tolist()))

    def record(self) -> dict[str, Any]:
        """As JSON holds it, the total with its interval."""
        rounded = {name: float(f"{getattr(self, name):.6g}") for name in ("mean", "weighted")}
        return {"total": estimate(self.values).record(), **rounded}


def noise_predictor(sd: Engine, customization: Customization | None = None) -> Predict:
    """``predict(prompts, z_t, t) -> eps``: the conditional noise prediction under a customisation, float32.

    An Infusion's is the customised pipeline's, under its foundation's maps on the same latents.

    Raises:
        ValueError: the customisation is a DCI, which is a way to draw and not another model: measure its concepts.
    """
    if isinstance(customization, DCI):
        rule = "customization must be a model of its own, which DCI, a way to draw, is not: measure engine.ICO"
        raise ValueError(f"{rule}, got {customization!r}")

    @torch.no_grad()
    def predict(prompts: Sequence[str], latents: Tensor, timesteps: Tensor) -> Tensor:
        height, width = (side * sd.vae.config.factor for side in latents.shape[2:])
        options = Options(
            guidance_scale=1.0, seed=0, height=height, width=width, latents=latents, customization=customization
        )
        request = make_request(sd.limits, list(prompts), options)
        plan = make_plans(request, options.steps, Texts(sd.text_encoder), sd.concepts, sd.device)[0]
        rows, starts = plan.rows, plan.starts
        shifts = sd.unet.time_shifts(timesteps.to(sd.device)[starts][rows.trajectories])
        x = latents.to(sd.device, sd.dtype)[starts]
        x = x if rows.batch.shared is not None else x[rows.trajectories]
        predicted = sd.unet.denoise(x, Conditioning(rows.batch, shifts)).float()
        return predicted[rows.conditional][plan.pictures]

    return predict


@torch.no_grad()
def fisher_divergence(
    sd: Engine,
    base: Predict,
    custom: Predict,
    latents: Tensor,
    prompts: Sequence[str],
    seed: int = 0,
    repeats: int = 1,
    batch_size: int = 16,
) -> Divergence:
    """How far two models' noise predictions are apart; both see the same noise and timesteps.

    Args:
        sd: whose schedule and prediction type both have.
        base, custom: see ``noise_predictor``.
        latents: (n, 4, h, w) pictures, scaled as the UNet sees them.
        prompts: (n) what each of them shows.
        seed: of timesteps, uniform over the schedule, and noise; a pair's depend on its index alone.
        repeats: timesteps and noises per pair.
        batch_size: pairs at a time.
    """
    if not len(latents) or len(latents) != len(prompts):
        raise ValueError(f"prompts must be one per latent ({len(latents)}), got {len(prompts)}")
    pairs = [(i, part) for part in range(repeats) for i in range(len(latents))]
    chunks = [pairs[first : first + batch_size] for first in range(0, len(pairs), batch_size)]
    sums = [
        pair_sums(sd, base, custom, latents[[i for i, _ in chunk]], [prompts[i] for i, _ in chunk], chunk, seed)
        for chunk in chunks
    ]
    return Divergence.of(torch.cat(sums, dim=1).unflatten(1, (repeats, -1)).mean(dim=1), latents[0].numel())


@torch.no_grad()
def pair_sums(
    sd: Engine,
    base: Predict,
    custom: Predict,
    latents: Tensor,
    prompts: Sequence[str],
    pairs: Sequence[tuple[int, int]],
    seed: int = 0,
) -> Tensor:
    """What some pairs of picture and prompt add to the divergence, in one batch.

    Args:
        sd, base, custom, seed: see ``fisher_divergence``.
        latents: (n, 4, h, w) the pairs' pictures.
        prompts: (n) the pairs' prompts.
        pairs: (n) number among all pairs, and repeat, which decide timestep and noise.

    Returns:
        (2, n) float64: the squared difference summed over a latent's elements, and the same over ``2 sigma_t^2``.
    """
    alphas = torch.from_numpy(alphas_cumprod(sd.schedule)).float()
    generators = [make_generator(seed, 4, i, part) for i, part in pairs]
    timesteps = torch.stack([torch.randint(0, len(alphas), (), generator=one) for one in generators])
    noise = torch.stack([torch.randn(latents.shape[1:], generator=one) for one in generators])
    alpha_bar = alphas[timesteps][:, None, None, None]
    noisy = alpha_bar.sqrt() * latents.float().cpu() + (1 - alpha_bar).sqrt() * noise
    difference = (custom(prompts, noisy, timesteps) - base(prompts, noisy, timesteps)).cpu()
    squares = difference.double().square()
    if sd.schedule.prediction_type == "v_prediction":  # eps = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) z_t
        squares = squares * alpha_bar
    sums = squares.flatten(1).sum(dim=1)
    return torch.stack([sums, sums / (2 * (1 - alpha_bar.flatten()))])
