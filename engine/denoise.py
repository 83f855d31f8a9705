"""The denoising loop: [UNet over the rows -> guidance -> sampler step] x T. It never waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .attention import Recorder
from .conditioning import Conditioning
from .masks import MaskRecorder
from .rows import RowPlan
from .samplers import SamplerTable, step
from .unet import UNet2DConditionModel


def denoise(
    unet: UNet2DConditionModel,
    table: SamplerTable,
    plans: Sequence[RowPlan],
    start: Tensor,
    noise: Sequence[Tensor],
    on_step: Callable[[int, Tensor], bool],
    recorder: Recorder | None = None,
    mask_recorder: MaskRecorder | None = None,
) -> tuple[Tensor, RowPlan, Tensor]:
    """Run a sampler from its first step to its last.

    Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598): ``eps = eps_u + s (eps_c - eps_u)``.

    Args:
        unet: the noise predictor.
        table: the sampler on its schedule, on the device of ``start``.
        plans: rows and trajectories of each phase; their steps add up to the table's.
        start: (n, 4, h, w) float32 starts at the table's first noise level; see ``RowPlan.starts``.
        noise: what each of the table's noisy steps draws, in the order and shape of ``start``.
        on_step: called with the index and the pictures' latents (I, 4, h, w) after each step; False ends the loop.
        recorder, mask_recorder: record the attention maps that the plans watch, and the masks by which rows mix.

    Returns:
        The latents of all trajectories (P, 4, h, w), the plan of the last step taken, whose trajectories they are, and
        for each step (T,) whether its latents were finite.
    """
    dtype = unet.conv_in.weight.dtype
    shifts = unet.time_shifts(table.timesteps)
    x = start[plans[0].starts]
    history = table.start_history(x)
    positions = torch.arange(len(table), device=x.device)
    finite = torch.ones(len(table), dtype=torch.bool, device=x.device)
    plan, text, observe, observe_masks = plans[0], (), None, None
    plan_of_step = [phase for phase in plans for _ in range(phase.steps)]
    for i, plan in enumerate(plan_of_step):
        if i == 0 or plan is not plan_of_step[i - 1]:
            x, history = x[plan.inherits], history[:, plan.inherits]
            text = tuple((keys[plan.texts], values[plan.texts]) for keys, values in plan.text_kv)
            observe = None if recorder is None else recorder.watching(plan.watched)
            observe_masks = None if mask_recorder is None else mask_recorder.watching(plan.mixed_images)
        latents = (x * table.input_scale[i]).to(dtype)
        if plan.shared is None:
            latents = latents[plan.trajectories]
        shift = tuple(shift[i].expand(len(plan.trajectories), -1) for shift in shifts)
        condition = Conditioning(shift, text, plan.following, plan.mixing, plan.shared, observe, observe_masks)
        noise_pred = unet.denoise(latents, condition).float()
        unconditional, conditional = noise_pred[plan.unconditional], noise_pred[plan.conditional]
        noise_pred = unconditional + plan.guidance_scale * (conditional - unconditional)
        fresh = noise[i][plan.starts] if i < table.noise_draws else None
        x, history = step(table, x, noise_pred, positions[i].expand(len(x)), history, fresh)
        finite[i] = torch.isfinite(x).all()
        if not on_step(i, x[plan.pictures]):
            break
    return x, plan, finite
