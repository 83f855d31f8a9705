"""The denoising loop: [UNet over the rows -> guidance -> sampler step] x T. It never waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .rows import RowPlan
from .samplers import SamplerTable, step
from .unet import Conditioning, Observe, UNet2DConditionModel


def denoise(
    unet: UNet2DConditionModel,
    table: SamplerTable,
    plan: RowPlan,
    start: Tensor,
    noise: Sequence[Tensor],
    on_step: Callable[[int, Tensor], bool],
    observe: Observe | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a sampler from its first step to its last.

    Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598): ``eps = eps_u + s (eps_c - eps_u)``.

    Args:
        unet: the noise predictor.
        table: the sampler on its schedule, on the device of ``x``.
        plan: rows and trajectories.
        start: (I, 4, h, w) float32 start of each image, at the table's first noise level.
        noise: what each of the table's noisy steps draws, (I, 4, h, w) each.
        on_step: called with the index and the trajectories' latents after each step; False ends the loop.
        observe: see ``Conditioning``.

    Returns:
        The latents of all trajectories (P, 4, h, w), and for each step (T,) whether these were finite.
    """
    dtype = unet.conv_in.weight.dtype
    shifts = unet.time_shifts(table.timesteps)
    text = tuple((keys[plan.texts], values[plan.texts]) for keys, values in unet.text_kv(plan.context))
    x = start[plan.images]
    history = table.start_history(x)
    positions = torch.arange(len(table), device=x.device)
    finite = torch.ones(len(table), dtype=torch.bool, device=x.device)
    for i in range(len(table)):
        rows = (x * table.input_scale[i]).to(dtype)[plan.trajectories]
        shift = tuple(shift[i].expand(len(rows), -1) for shift in shifts)
        condition = Conditioning(shift, text, plan.following, observe)
        noise_pred = unet.denoise(rows, condition).float()
        unconditional, conditional = noise_pred[plan.unconditional], noise_pred[plan.conditional]
        noise_pred = unconditional + plan.guidance_scale * (conditional - unconditional)
        fresh = noise[i][plan.images] if i < table.noise_draws else None
        x, history = step(table, x, noise_pred, positions[i].expand(len(x)), history, fresh)
        finite[i] = torch.isfinite(x).all()
        if not on_step(i, x):
            break
    return x, finite
