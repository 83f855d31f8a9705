"""The denoising loop: [UNet over the rows -> guidance -> sampler step] x T. It never waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .samplers import SamplerTable, step
from .unet import Conditioning, UNet2DConditionModel


def denoise(
    unet: UNet2DConditionModel,
    table: SamplerTable,
    x: Tensor,
    context: Tensor,
    guidance_scale: float,
    noise: Sequence[Tensor],
    on_step: Callable[[int, Tensor], bool],
) -> tuple[Tensor, Tensor]:
    """Run a sampler from its first step to its last.

    Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598): ``eps = eps_u + s (eps_c - eps_u)``.

    Args:
        unet: the noise predictor.
        table: the sampler on its schedule, on the device of ``x``.
        x: (B, 4, h, w) float32 start, at the table's first noise level.
        context: encoded text; (2B, S, E), unconditional rows first, or (B, S, E) for a guidance scale of 1.
        guidance_scale: s.
        noise: what each of the table's noisy steps draws, (B, 4, h, w) each.
        on_step: called with the index and the latents after each step; False ends the loop.

    Returns:
        The latents, and for each step (T,) whether its latents were finite.
    """
    guided = guidance_scale != 1
    dtype = unet.conv_in.weight.dtype
    shifts = unet.time_shifts(table.timesteps)
    text = unet.text_kv(context)
    history = table.start_history(x)
    positions = torch.arange(len(table), device=x.device)
    finite = torch.ones(len(table), dtype=torch.bool, device=x.device)
    for i in range(len(table)):
        sample = (x * table.input_scale[i]).to(dtype)
        rows = torch.cat([sample, sample]) if guided else sample
        condition = Conditioning(tuple(shift[i].expand(len(rows), -1) for shift in shifts), text)
        noise_pred = unet.denoise(rows, condition).float()
        if guided:
            unconditional, conditional = noise_pred.chunk(2)
            noise_pred = unconditional + guidance_scale * (conditional - unconditional)
        fresh = noise[i] if i < table.noise_draws else None
        x, history = step(table, x, noise_pred, positions[i].expand(len(x)), history, fresh)
        finite[i] = torch.isfinite(x).all()
        if not on_step(i, x):
            break
    return x, finite
