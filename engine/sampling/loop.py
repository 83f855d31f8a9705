"""The denoising loop: one step of the batch after the other. It never waits for the device."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import is_

import torch
from torch import Tensor

from ..backends.graphs import Run, run_eagerly
from ..errors import NonFiniteError
from ..models.unet import UNet2DConditionModel
from ..observe.masks import MaskRecorder
from ..observe.word_maps import Recorder
from .inpaint import Inpainting
from .join import Size, exactly, join_phases, join_states
from .plan import RowPlan
from .step import Phase, State, guided_step
from .timetable import Timetable


@dataclass(slots=True, eq=False)
class Denoising:
    """A request's trajectories on their way from noise to pictures.

    Attributes:
        plans: rows and trajectories of each phase; their steps add up to the timetable's.
        timetable: the sampler's table, and what the UNet is told at its steps.
        noise: what each of the table's noisy steps draws, (n, 4, h, w) in the order of the starts.
        x: (P, 4, h, w) float32 latents, of the trajectories of ``plan``.
        history: (K - 1, P, 4, h, w), the sampler's.
        finite: (T,) bool, whether the latents were finite after each step.
        plan: of the last step taken; before the first, of that.
        recorder, mask_recorder: record the attention maps that the plans watch, and the masks by which rows mix.
        inpainting: of the starts (n, ...); None where no picture is inpainted.
        shows_clean: whether ``shown`` is the clean latents that the model predicts, not the noisy ones.
        taken: how many steps have been.
        before: ``x`` and history before the last step, where clean latents are shown.
    """

    plans: Sequence[RowPlan]
    timetable: Timetable
    noise: Sequence[Tensor]
    x: Tensor
    history: Tensor
    finite: Tensor
    plan: RowPlan
    recorder: Recorder | None = None
    mask_recorder: MaskRecorder | None = None
    inpainting: Inpainting | None = None
    shows_clean: bool = False
    taken: int = 0
    before: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.timetable)

    @property
    def is_done(self) -> bool:
        return self.taken == len(self)

    @property
    def records(self) -> bool:
        return self.recorder is not None or self.mask_recorder is not None

    @property
    def pictures(self) -> Tensor:
        """(I, 4, h, w), the latents of the images."""
        return self.x[self.plan.pictures]

    @property
    def shown(self) -> Tensor:
        """(I, 4, h, w), what a callback is given after a step."""
        if self.before is None:
            return self.pictures
        i, plan, table, inpainting = self.taken - 1, self.plan, self.timetable.table, self.next_inpainting()
        noise = self.noise[i][plan.starts] if i < table.noise_draws else None
        if inpainting is None:
            return table.clean_latents(i, *self.before, noise, self.x)[plan.pictures]
        after = inpainting.before_keeping(self.x, table.coefficients, torch.full_like(plan.starts, i))
        return inpainting.keep_clean(table.clean_latents(i, *self.before, noise, after))[plan.pictures]

    @property
    def next_plan(self) -> RowPlan:
        """The plan of the next step."""
        ends = list(accumulate(plan.steps for plan in self.plans))
        return self.plans[bisect_right(ends, self.taken)]

    def check_finite(self) -> None:
        """Raise ``NonFiniteError`` where latents were not, naming the first such step."""
        if not self.finite.all():
            i = int((~self.finite).nonzero()[0])
            where = f"at step {i} of {len(self)} (timestep {float(self.timetable.table.timesteps[i]):g})"
            raise NonFiniteError(f"the UNet produced NaN or infinity {where}")

    def enter_step(self) -> RowPlan:
        """``next_plan``; where it begins a phase, trajectories go on from those of the one before."""
        plan = self.next_plan
        if plan is not self.plan:
            self.x, self.history, self.plan = self.x[plan.inherits], self.history[:, plan.inherits], plan
        return plan

    def fresh_noise(self) -> Tensor | None:
        """What the next step draws, in the shape of ``x``; None where it draws nothing."""
        draws = self.taken < self.timetable.table.noise_draws
        return self.noise[self.taken][self.plan.starts] if draws else None

    def next_inpainting(self) -> Inpainting | None:
        """What the next step needs to inpaint, of the trajectories of ``x``."""
        return None if self.inpainting is None else self.inpainting.take(self.plan.starts)


def start_denoising(
    plans: Sequence[RowPlan],
    timetable: Timetable,
    start: Tensor,
    noise: Sequence[Tensor],
    recorder: Recorder | None = None,
    mask_recorder: MaskRecorder | None = None,
    inpainting: Inpainting | None = None,
    shows_clean: bool = False,
) -> Denoising:
    """A ``Denoising`` before its first step.

    Args:
        start: (n, 4, h, w) float32 starts at the table's first noise level; see ``RowPlan.starts``.
    """
    x = start[plans[0].starts]
    finite = torch.ones(len(timetable), dtype=torch.bool, device=x.device)
    history = timetable.table.start_history(x)
    return Denoising(
        plans, timetable, noise, x, history, finite, plans[0], recorder, mask_recorder, inpainting, shows_clean
    )


class Stepper:
    """Takes the next step of some requests, whichever steps they are at, in one batch of the UNet.

    What their batch shares is put together anew only where other requests or phases come than at the step before.

    Args:
        unet: the noise predictor.
        run: how a step is run that records nothing.
        run_recording: how one is run that does, which copies to the host and is never replayed. It may run a step
            again; what the first attempt recorded is then forgotten.
        size: what the counts of rows of each kind and of table entries are filled up to; ``join.bucket`` where every
            size is captured.
    """

    def __init__(
        self, unet: UNet2DConditionModel, run: Run = run_eagerly, run_recording: Run = run_eagerly, size: Size = exactly
    ) -> None:
        self.unet, self.run, self.run_recording, self.size = unet, run, run_recording, size
        self._plans: list[RowPlan] = []
        self._joined: tuple[Phase, list[int]] | None = None

    def __call__(self, together: Sequence[Denoising]) -> None:
        """Advance each by a step; none is changed where that fails. A request that records must be alone."""
        plans = [one.enter_step() for one in together]
        if self._joined is None or len(plans) != len(self._plans) or not all(map(is_, plans, self._plans)):
            self._joined = join_phases(plans, [one.timetable for one in together], self.size)
            self._plans = plans
        phase, offsets = self._joined
        state = join_states(together, offsets, phase)
        recording = [one for one in together if one.records]
        assert not recording or len(together) == 1
        step, run = (_recording(self.unet, together[0]), self.run_recording) if recording else (self._step, self.run)
        name = f"step of {len(phase.rows.trajectories)} rows, latents {state.x.shape[2]}x{state.x.shape[3]}"
        x, history, whole = run(name, step, phase, state)
        first = 0
        for one in together:
            own = slice(first, first := first + len(one.x))
            one.before = (one.x, one.history) if one.shows_clean else None
            one.x, one.history, one.finite[one.taken] = x[own], history[: len(one.history), own], whole[own].all()
            one.taken += 1
        for recorder in [one for denoising in recording for one in (denoising.recorder, denoising.mask_recorder)]:
            if recorder is not None:
                recorder.keep_step()

    def forget(self) -> None:
        """Let go of the tensors of the last batch."""
        self._plans, self._joined = [], None

    def _step(self, phase: Phase, state: State) -> tuple[Tensor, Tensor, Tensor]:
        return guided_step(self.unet, phase, state)


def denoise(stepper: Stepper, denoising: Denoising, on_step: Callable[[int, Tensor], bool]) -> None:
    """Go from the first step to the last; ``on_step(i, latents of the images)`` after each ends it with False."""
    while not denoising.is_done:
        stepper([denoising])
        if not on_step(denoising.taken - 1, denoising.shown):
            return


def _recording(
    unet: UNet2DConditionModel, denoising: Denoising
) -> Callable[[Phase, State], tuple[Tensor, Tensor, Tensor]]:
    """``guided_step`` that records; each attempt at a step begins anew."""
    recorder, mask_recorder, plan = denoising.recorder, denoising.mask_recorder, denoising.plan
    observe = None if recorder is None else recorder.watching(plan.watched)
    observe_masks = None if mask_recorder is None else mask_recorder.watching(plan.mixed_images)

    def one_step(phase: Phase, state: State) -> tuple[Tensor, Tensor, Tensor]:
        for one in (recorder, mask_recorder):
            if one is not None:
                one.forget_step()
        return guided_step(unet, phase, state, observe, observe_masks)

    return one_step
