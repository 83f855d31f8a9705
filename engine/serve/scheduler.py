"""Many callers, one batch: requests of every kind take their steps together, and join and leave at any step.

One thread owns the Engine. Before every step it chooses who takes it (``policy.choose``), begins those that are new,
runs one UNet batch for all, and hands those that are done to a second thread, which decodes them beside the next step.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from tqdm import tqdm

from ..backends.graphs import beside
from ..checks import check_integer, check_number
from ..engine import Engine
from ..errors import DeadlineError
from ..methods.concept_cache import Texts
from ..observe.progress import StageClock, Steps
from ..options import make_options, takes
from ..result import Result
from ..sampling.arguments import Options
from ..sampling.control import cost_in_rows
from ..sampling.join import bucket, exactly
from ..sampling.keys import chunk_kind
from ..sampling.plan import lay_out
from ..sampling.request import Request, make_request
from .job import Job, Phase
from .pace import Budgets, Pace
from .policy import Candidate, catch_up, choose
from .queue import Queue

_MOST_DECODING = 8  # requests that wait for the VAE; more would hold their texts' keys and values for nothing


class Scheduler(Queue[Job]):
    """Draws the requests of many callers in shared batches; a context manager that waits for them at its end.

    A picture does not depend on what it shared a batch with, beyond rounding. A request that fails fails alone.

    Args:
        sd: the Engine; others may go on calling its ``generate``, beside the batches.
        max_rows: of the UNet that a step has at most, unless one request alone has more. Where not given, it is
            profiled for the model's own size now, and for another size when the first picture of it is asked for.
        max_waiting: requests that wait for their first step; more are refused.

    Raises:
        ValueError: a number is too small.
    """

    def __init__(self, sd: Engine, max_rows: int | None = None, max_waiting: int = 64) -> None:
        super().__init__(max_waiting)
        self.sd = sd
        self._decoding = 0  # requests that have taken their steps, and are no longer among the jobs
        self._served: dict[str, float] = {}
        self._budgets = Budgets(sd, None if max_rows is None else check_integer("max_rows", max_rows, 1))
        self._stepper = sd.stepper(exactly if sd.graphs is None else bucket)
        self._stages = ThreadPoolExecutor(1, "twinstream-decode")
        side = sd.limits.sample_size * sd.limits.factor
        self._budgets.prepare((side, side))
        self._thread = threading.Thread(target=self._work, name="twinstream-steps", daemon=True)
        self._thread.start()

    @takes(Options)
    def submit(
        self, prompt: str | Sequence[str], *, client: str = "", deadline: float | None = None, **options: Any
    ) -> Job:
        """Ask for pictures.

        Args:
            prompt: as ``Engine.generate`` takes it.
            client: whose request it is; steps are shared fairly between clients.
            deadline: seconds from now by which the pictures must be there.
            {options}

        Returns:
            A ``concurrent.futures.Future`` of the ``Result``; see ``Job``.

        Raises:
            ValueError: an argument cannot be honoured, or a customised noun has no place in its prompt.
            QueueFullError: as many requests wait as may; it says when to try again.
            DeadlineError: the pictures could not be there in time.
            SchedulerClosedError: the scheduler has been closed.
        """
        arrived = time.monotonic()
        if not isinstance(client, str):
            raise ValueError(f"client must be a text, got {client!r}")
        due = None if deadline is None else arrived + check_number("deadline", deadline, 0.0)
        asked = make_options(Options, "submit", {"progress": False} | options)
        if asked.scheduler is not None:
            raise ValueError("scheduler is what submit is called on; it takes none beside")
        with self._changed:
            self._check_open()  # at once, before the work that follows
        request = make_request(self.sd.limits, prompt, asked)
        job = Job(self, request, self._phases(request), client, due, StageClock(self.sd.device))
        with self._changed:
            self._check_open()
            if due is not None and (late := arrived + self._budgets.seconds_to_end(job, self._jobs) - due) > 0:
                self.counts["refused"] += 1
                raise DeadlineError(
                    f"deadline must leave the time that is needed, got {deadline:g} s; it would take {late:.2g} s more"
                )
            present = list({one.client for one in self._jobs})
            self._served[client] = catch_up(self._served, client, present)
            self._jobs.append(job)
            self._changed.notify_all()
        return job

    def draw(self, sd: Engine, prompt: str | Sequence[str], options: dict[str, Any]) -> Result:
        """What ``sd.generate(prompt, **options)`` returns, where its options name this scheduler."""
        if sd is not self.sd:
            raise ValueError(f"scheduler must be one of this Engine, got one of {self.sd.name!r}")
        given: dict[str, Any] = {"progress": True} | options | {"scheduler": None}
        job = self.submit(prompt, **given)
        try:
            return job.result()
        finally:
            job.cancel()  # where waiting was interrupted

    @property
    def drawing(self) -> int:
        """How many requests are being drawn or decoded."""
        with self._changed:
            return super().drawing + self._decoding

    def close(self, cancel: bool = False) -> None:
        """Take no more requests, and wait for those that are there; ``cancel`` cancels them instead."""
        self._stop_taking(cancel)
        self._thread.join()
        self._stages.shutdown()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(cancel=kind is not None)

    def wake(self) -> None:
        """Look at the jobs again; one was cancelled."""
        with self._changed:
            self._changed.notify_all()

    @torch.no_grad()
    def _phases(self, request: Request) -> tuple[Phase, ...]:
        """What each phase needs, by a layout that costs its tokens alone."""
        options = request.options
        steps = len(self.sd.timetables.of(request))
        layouts = lay_out(request, steps, Texts(self.sd.text_encoder, options.long_prompts, options.clip_skip))
        return tuple(Phase(n, cost_in_rows(layout), (layout.mixing_kind, chunk_kind(layout))) for n, layout in layouts)

    @torch.no_grad()
    def _work(self) -> None:
        try:
            while self._wait():
                for size in {job.request.size for job in self._jobs} - self._budgets.rows.keys():
                    self._budgets.prepare(size)
                self._step([job for job in self._choose() if self._begin(job)])
        except BaseException as error:
            with self._changed:
                self._closing, left = True, self._jobs
                self._jobs = []
            for job in left:
                job.fail(error)
            raise

    def _wait(self) -> bool:
        """Until there is something to do; False where nothing is left and nothing will come."""
        with self._changed:
            while True:
                self._drop_finished()
                if self._jobs and self._decoding < _MOST_DECODING:
                    return True
                if not self._jobs:
                    self._stepper.forget()
                    if self._closing:
                        return False
                self._changed.wait()

    def _choose(self) -> list[Job]:
        """Who takes the next step; whoever has come with a size of his own meanwhile waits for the one after."""
        with self._changed:
            jobs = [job for job in self._jobs if job.request.size in self._budgets.rows]
            chosen = choose([self._candidate(job) for job in jobs], self._served, self._key_budget)
            return [jobs[i] for i in chosen]

    def _drop_finished(self) -> None:
        """Let go of those that were cancelled or have failed, and of those that will be late."""
        now = time.monotonic()
        for job in self._jobs:
            if job.due is not None and now + job.steps_left * self._pace(job).seconds(job.rows) > job.due:
                left = f"{job.steps_left} steps are left, and {max(0.0, job.due - now):.2g} s"
                job.fail(DeadlineError(f"deadline must leave the time that is needed: {left}"))
        for job in self._jobs:
            if job.cancelled():
                job.set_running_or_notify_cancel()  # tells those that wait for several
                self.counts["cancelled"] += 1
            elif job.done():
                self.counts["failed"] += 1
        self._jobs = [job for job in self._jobs if not job.done()]
        present = {job.client for job in self._jobs}
        least = min((self._served[one] for one in present), default=math.inf)
        self._served = {one: had for one, had in self._served.items() if one in present or had > least}

    def _candidate(self, job: Job) -> Candidate:
        key: Hashable = id(job) if job.records else (job.request.size, job.phase.kind)
        return Candidate(job.client, key, job.rows)

    def _key_budget(self, key: Hashable) -> int:
        return self._budgets.rows[key[0]] if isinstance(key, tuple) else 1

    def _pace(self, job: Job) -> Pace:
        return self._budgets.pace(job.request.size)

    def _begin(self, job: Job) -> bool:
        """Encode its texts and start its latents; False where that fails."""
        if job.denoising is not None:
            return True
        job.clock.stages["queue"] = time.perf_counter() - job.clock.start
        try:
            job.denoising = self.sd.begin(job.request, job.clock)
        except (ValueError, RuntimeError) as error:
            job.fail(error)
            return False
        asked, total = job.request.options, len(job.denoising)
        bar = tqdm(total=total, disable=not asked.progress, unit="step")
        job.steps, job.began, job.has_begun = Steps(asked.callback, total, bar), time.perf_counter(), True
        return True

    def _step(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        rows, start = sum(job.rows for job in jobs), time.perf_counter()
        together = [job.denoising for job in jobs if job.denoising is not None]
        try:
            self._stepper(together)
        except Exception as error:
            self._stepper.forget()
            if len(jobs) == 1:
                jobs[0].fail(self._explained(jobs[0], error))
                return
            if isinstance(error, torch.OutOfMemoryError):
                self._budgets.rows[jobs[0].request.size] = max(1, rows // 2)
            del error
            for job in jobs:  # whichever it is fails alone
                self._step([job])
            return
        seconds = time.perf_counter() - start
        self._pace(jobs[0]).observe(rows, seconds)
        self.step_seconds += seconds
        self.counts["steps"] += 1
        self.counts["rows"] += rows
        for job in jobs:
            self._served[job.client] += job.rows
            self._after_step(job)

    def _explained(self, job: Job, error: Exception) -> Exception:
        if not isinstance(error, torch.OutOfMemoryError) or job.denoising is None:
            return error
        explained = self.sd.out_of_memory(job.request, job.denoising)
        explained.__cause__ = error.with_traceback(None)
        return explained

    def _after_step(self, job: Job) -> None:
        denoising, steps = job.denoising, job.steps
        assert denoising is not None
        assert steps is not None
        try:
            goes_on = steps(denoising.taken - 1, denoising.shown)
        except Exception as error:
            job.fail(error)
            return
        if goes_on and not denoising.is_done:
            return
        job.clock.stages["denoise"] = time.perf_counter() - job.began
        steps.bar.close()
        with self._changed:
            self._jobs.remove(job)
            self._decoding += 1
        self._stages.submit(self._finish, job)

    @torch.no_grad()
    def _finish(self, job: Job) -> None:
        denoising, steps = job.denoising, job.steps
        assert denoising is not None
        assert steps is not None
        outcome: Result | Exception | None = None
        try:
            if not job.cancelled():
                with beside(self.sd.device):
                    outcome = self.sd.finish(job.request, denoising, job.clock, steps.cancelled)
        except Exception as error:
            outcome = error
        wanted = job.set_running_or_notify_cancel()  # from here on it can no longer be cancelled
        with self._changed:
            self._decoding -= 1
            self.counts["failed" if isinstance(outcome, Exception) else "done" if wanted else "cancelled"] += 1
            self._changed.notify_all()
        if wanted and isinstance(outcome, Result):
            job.set_result(outcome)
        elif wanted:
            assert isinstance(outcome, Exception)
            job.set_exception(outcome)
        job.denoising = None

    def _seconds_to_room(self) -> float:
        """When the request that will be done first is likely to be."""
        return max(0.1, min(one.steps_left * self._pace(one).seconds(one.rows) for one in self._jobs))
