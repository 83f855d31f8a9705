"""The denoising loop: [UNet over the rows -> guidance -> sampler step] x T. It never waits for the device.

One step is a function of tensors alone, those that a phase shares and those that change from step to step, so that a
``Run`` may capture it once and replay it with other prompts, concepts, schedules and positions; see ``graphs.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.graphs import Run, run_eagerly
from ..models.conditioning import Conditioning, Observe, ObserveMasks
from ..models.unet import UNet2DConditionModel
from ..observe.masks import MaskRecorder
from ..observe.word_maps import Recorder
from .plan import GuidedBatch, RowPlan
from .table import Coefficients, SamplerTable, over_latents, step

_ROOM = 64  # schedules have entries in multiples of this, so that runs of 20 and of 50 steps are of one size


@dataclass(frozen=True, slots=True)
class Phase:
    """What the steps of one phase share: its rows, and a schedule.

    Attributes:
        rows: who is evaluated.
        coefficients: the sampler's, with T entries or more.
        shifts: (T, sum of C), the UNet's at those entries.
    """

    rows: GuidedBatch
    coefficients: Coefficients
    shifts: Tensor


@dataclass(frozen=True, slots=True)
class State:
    """What changes from step to step.

    Attributes:
        x: (P, 4, h, w) float32 latents.
        history: (K - 1, P, 4, h, w), the sampler's.
        positions: (P,) int64, each trajectory's entry of the schedule.
        noise: (P, 4, h, w) fresh noise; None for a sampler that draws none.
    """

    x: Tensor
    history: Tensor
    positions: Tensor
    noise: Tensor | None


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
    latents = latents.to(unet.conv_in.weight.dtype)
    if rows.batch.shared is None:
        latents = latents[rows.trajectories]
    shifts = phase.shifts[state.positions[rows.trajectories]]
    noise_pred = unet.denoise(latents, Conditioning(rows.batch, shifts, observe, observe_masks)).float()
    unconditional, conditional = noise_pred[rows.unconditional], noise_pred[rows.conditional]
    noise_pred = unconditional + rows.guidance_scale * (conditional - unconditional)
    x, history = step(phase.coefficients, state.x, noise_pred, state.positions, state.history, state.noise)
    return x, history, torch.isfinite(x).flatten(1).all(dim=1)


def denoise(
    unet: UNet2DConditionModel,
    table: SamplerTable,
    plans: Sequence[RowPlan],
    start: Tensor,
    noise: Sequence[Tensor],
    on_step: Callable[[int, Tensor], bool],
    recorder: Recorder | None = None,
    mask_recorder: MaskRecorder | None = None,
    run: Run = run_eagerly,
    run_recording: Run = run_eagerly,
) -> tuple[Tensor, RowPlan, Tensor]:
    """Run a sampler from its first step to its last.

    Args:
        unet: the noise predictor.
        table: the sampler on its schedule, on the device of ``start``.
        plans: rows and trajectories of each phase; their steps add up to the table's.
        start: (n, 4, h, w) float32 starts at the table's first noise level; see ``RowPlan.starts``.
        noise: what each of the table's noisy steps draws, in the order and shape of ``start``.
        on_step: called with the index and the pictures' latents (I, 4, h, w) after each step; False ends the loop.
        recorder, mask_recorder: record the attention maps that the plans watch, and the masks by which rows mix.
        run: how a step is run that records nothing.
        run_recording: how one is run that does, which copies to the host and is never replayed. It may run a step
            again; what the first attempt recorded is then forgotten.

    Returns:
        The latents of all trajectories (P, 4, h, w), the plan of the last step taken, whose trajectories they are, and
        for each step (T,) whether its latents were finite.
    """
    x = start[plans[0].starts]
    history = table.start_history(x)
    finite = torch.ones(len(table), dtype=torch.bool, device=x.device)
    shifts = unet.time_shifts(table.timesteps)
    plan, i = plans[0], 0
    for plan in plans:
        phase = make_phase(plan, table.coefficients, shifts)
        x, history = x[plan.inherits], history[:, plan.inherits]
        one_step, how = partial(guided_step, unet), run
        if recorder is not None or mask_recorder is not None:
            one_step, how = _recording(unet, plan, recorder, mask_recorder), run_recording
        name = f"step of {len(plan.rows.trajectories)} rows, latents {x.shape[2]}x{x.shape[3]}"
        for _ in range(plan.steps):
            if i < table.noise_draws:
                fresh = noise[i][plan.starts]
            else:  # LCM's last step draws none, but is run like those that do
                fresh = torch.zeros_like(x) if table.noise_draws else None
            state = State(x, history, torch.full_like(plan.starts, i), fresh)
            x, history, whole = how(name, one_step, phase, state)
            finite[i] = whole.all()
            for one in (recorder, mask_recorder):
                if one is not None:
                    one.keep_step()
            if not on_step(i, x[plan.pictures]):
                return x, plan, finite
            i += 1
    return x, plan, finite


def make_phase(plan: RowPlan, coefficients: Coefficients, shifts: Tensor) -> Phase:
    """Gather what the steps of a plan share; ``shifts`` (T, sum of C) are the UNet's on the sampler's schedule."""
    missing = -len(shifts) % _ROOM
    return Phase(
        rows=plan.rows,
        coefficients=coefficients.map(lambda x: F.pad(x, (0, 0) * (x.ndim - 1) + (0, missing))),
        shifts=F.pad(shifts, (0, 0, 0, missing)),
    )


def _recording(
    unet: UNet2DConditionModel, plan: RowPlan, recorder: Recorder | None, mask_recorder: MaskRecorder | None
) -> Callable[[Phase, State], tuple[Tensor, Tensor, Tensor]]:
    """``guided_step`` that records; each attempt at a step begins anew."""
    observe = None if recorder is None else recorder.watching(plan.watched)
    observe_masks = None if mask_recorder is None else mask_recorder.watching(plan.mixed_images)

    def one_step(phase: Phase, state: State) -> tuple[Tensor, Tensor, Tensor]:
        for one in (recorder, mask_recorder):
            if one is not None:
                one.forget_step()
        return guided_step(unet, phase, state, observe, observe_masks)

    return one_step
