"""A request that a scheduler draws: a future of its result."""

from __future__ import annotations

from collections.abc import Hashable
from concurrent.futures import InvalidStateError
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..observe.progress import StageClock, Steps
from ..sampling.loop import Denoising
from ..sampling.request import Request
from .queue import Queued

if TYPE_CHECKING:
    from .scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Phase:
    """What a request's steps of one phase need of a batch: how many, their rows, and the kind that shares a batch."""

    steps: int
    rows: int
    kind: Hashable


class Job(Queued):
    """A submitted request.

    ``result()`` waits for the pictures, or raises what ``generate`` would; ``cancel()`` ends it between two steps,
    whether it waits or is being drawn. Its timings have a further stage, "queue", and "denoise" is from the first step
    to the last, with what it waited for others.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        request: Request,
        phases: tuple[Phase, ...],
        client: str,
        due: float | None,
        clock: StageClock,
    ) -> None:
        super().__init__(scheduler)
        self.request, self.client, self.due, self.clock = request, client, due, clock
        self.denoising: Denoising | None = None
        self.steps: Steps | None = None
        self.began = 0.0
        self._scheduler, self._phases = scheduler, phases

    def cancel(self) -> bool:
        """End it; False if it is done already. Its rows are free at the next step."""
        cancelled = super().cancel()  # it never is in the state "running", which could not be cancelled
        if cancelled:
            self._scheduler.wake()
        return cancelled

    @property
    def records(self) -> bool:
        """Whether it looks into its batch, which must then be its own."""
        options = self.request.options
        return bool(options.attention_words) or options.record_masks

    @property
    def phase(self) -> Phase:
        """Of its next step."""
        taken = 0 if self.denoising is None else self.denoising.taken
        for phase in self._phases:
            taken -= phase.steps
            if taken < 0:
                return phase
        return self._phases[-1]

    @property
    def rows(self) -> int:
        """Of its next step."""
        return self.phase.rows

    @property
    def steps_left(self) -> int:
        return sum(phase.steps for phase in self._phases) - (0 if self.denoising is None else self.denoising.taken)

    def fail(self, error: BaseException) -> None:
        """Give the error, unless it was cancelled meanwhile."""
        try:
            self.set_exception(error)
        except InvalidStateError:
            assert self.cancelled()
