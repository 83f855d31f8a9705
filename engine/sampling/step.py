"""One step of a batch: UNet over the rows, guidance, sampler step.

It is a function of tensors alone, those that a phase shares and those that change from step to step, so that a ``Run``
may capture it once and replay it with other prompts, concepts, schedules and positions; see ``graphs.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.conditioning import Conditioning, Observe, ObserveMasks
from ..models.unet import UNet2DConditionModel
from .control import net_residuals
from .inpaint import Inpainting
from .plan import GuidedBatch
from .table import Coefficients, over_latents, step


@dataclass(frozen=True, slots=True)
class Phase:
    """What the steps of one phase share: its rows, and a schedule.

    Attributes:
        rows: who is evaluated.
        coefficients: the sampler's, with T entries or more.
        shifts: (T, sum of C), the UNet's at those entries.
        net_shifts: likewise of each of ``rows.nets``.
    """

    rows: GuidedBatch
    coefficients: Coefficients
    shifts: Tensor
    net_shifts: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class State:
    """What changes from step to step.

    Attributes:
        x: (P, 4, h, w) float32 latents.
        history: (K - 1, P, 4, h, w), the sampler's.
        positions: (P,) int64, each trajectory's entry of the schedule.
        noise: (P, 4, h, w) fresh noise; None for a sampler that draws none.
        inpainting: of P trajectories; None where no picture is inpainted.
    """

    x: Tensor
    history: Tensor
    positions: Tensor
    noise: Tensor | None
    inpainting: Inpainting | None = None


def guided_step(
    unet: UNet2DConditionModel,
    phase: Phase,
    state: State,
    observe: Observe | None = None,
    observe_masks: ObserveMasks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of every trajectory.

    Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598): ``eps = eps_u + s (eps_c - eps_u)``.

    Returns:
        The next latents (P, 4, h, w) and history, and whether each trajectory (P,) is finite.
    """
    rows = phase.rows
    latents = state.x * over_latents(phase.coefficients.input_scale[state.positions])
    if state.inpainting is not None:
        latents = state.inpainting.tell(latents)
    latents = latents.to(unet.conv_in.weight.dtype)
    residuals = net_residuals(rows.nets, phase.net_shifts, latents[:, : unet.config.out_channels], state.positions)
    if rows.batch.shared is None:
        latents = latents[rows.trajectories]
    shifts = phase.shifts[state.positions[rows.trajectories]]
    condition = Conditioning(rows.batch, shifts, observe, observe_masks, residuals)
    noise_pred = unet.denoise(latents, condition).float()
    unconditional, conditional = noise_pred[rows.unconditional], noise_pred[rows.conditional]
    noise_pred = unconditional + rows.guidance_scale * (conditional - unconditional)
    if rows.guidance_rescale is not None:
        noise_pred = rescale_guidance(noise_pred, conditional, rows.guidance_rescale)
    x, history = step(phase.coefficients, state.x, noise_pred, state.positions, state.history, state.noise)
    if state.inpainting is not None:
        x = state.inpainting.keep(x, phase.coefficients, state.positions)
    return x, history, torch.isfinite(x).flatten(1).all(dim=1)


def rescale_guidance(guided: Tensor, conditional: Tensor, share: Tensor) -> Tensor:
    """Bring guidance's result to the conditional prediction's contrast (Lin et al. 2024, arXiv:2305.08891, sec. 3.4).

    Args:
        guided, conditional: predictions (P, 4, h, w), float32.
        share: (P, 1, 1, 1), how far: 0 changes nothing.
    """
    own, wanted = (x.std(dim=(1, 2, 3), keepdim=True) for x in (guided, conditional))
    return guided * (share * (wanted / own) + 1 - share)
