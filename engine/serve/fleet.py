"""Many Engines through Ray Serve behind what a ``Scheduler`` is to its callers.

Each replica has an Engine and a scheduler. Replicas are started, counted by how much waits, replaced when they die, and
exchanged one after the other when the model changes, by Ray Serve. A request whose replica dies is sent to another, and
only its answer counts, so nothing is lost or there twice.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..checks import check_integer, check_number
from ..engine import Engine
from ..loading import load
from ..methods.asked_pictures import NetFiles
from ..options import make_options
from ..result import Result
from ..sampling.arguments import Options
from ..sampling.request import make_request
from .nets import Nets
from .queue import Queue, Queued
from .ray_bulk import start_ray
from .scheduler import Scheduler

_NAME = "twinstream"
_MOST_TRIES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetOptions:
    """How many replicas there are, and what each takes.

    Attributes:
        replicas: at least.
        most_replicas: at most, by how many requests wait; None for always ``replicas``.
        cpus, gpus: of each; torch has as many threads as CPUs.
        max_rows: of each one's batches; see ``Scheduler``.
        ongoing: requests that one has at a time.
        address: of a Ray cluster ("auto" for this machine's); one is started where not given.
    """

    replicas: int = 1
    most_replicas: int | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    max_rows: int | None = None
    ongoing: int = 16
    address: str | None = None

    def __post_init__(self) -> None:
        check_integer("replicas", self.replicas, 1)
        check_integer("ongoing", self.ongoing, 1)
        if self.most_replicas is not None:
            check_integer("most_replicas", self.most_replicas, self.replicas)


class Replica:
    """An Engine and its scheduler, in an actor."""

    def __init__(
        self, loading: Mapping[str, Any], threads: int, max_rows: int | None, files: NetFiles | None = None
    ) -> None:
        import torch

        torch.set_num_threads(threads)
        self.scheduler = Scheduler(load(**loading), max_rows, max_waiting=10_000)  # the fleet bounds the queue
        self.nets = Nets(self.scheduler.sd, files)

    async def draw(
        self, prompt: str | list[str], client: str, due: float | None, options: dict[str, Any]
    ) -> AsyncIterator[Any]:
        """(step, total, latents) after each step, and then the result; who stops reading cancels.

        ``due`` is by the clock on the wall, as the time on the way counts too; None for no deadline.
        """
        import asyncio

        loop, steps = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def tell(*step: Any) -> None:
            loop.call_soon_threadsafe(steps.put_nowait, (step[0], step[1], step[2].cpu()))

        left, given = None if due is None else max(0.0, due - time.time()), self.nets.unpacked(options)
        job = self.scheduler.submit(prompt, client=client, deadline=left, callback=tell, **given)
        job.add_done_callback(lambda _: loop.call_soon_threadsafe(steps.put_nowait, None))
        try:
            while (step := await steps.get()) is not None:
                yield step
            yield job.result(0)
        finally:
            job.cancel()

    def check_health(self) -> None:
        if not self.scheduler.is_open:
            raise RuntimeError("the scheduler has ended")


class Fleet(Queue[Queued]):
    """Draws on many replicas; what it has in common with ``Scheduler`` is what the server calls.

    Args:
        sd: an Engine of the same model, which checks requests and draws nothing.
        loading: arguments of ``engine.load`` for the replicas.
        options: how many, and what they take.
        max_waiting: requests that wait for their first step; more are refused.
        nets: ``sd``'s networks, which the replicas load too: what a request may have.

    Raises:
        RuntimeError: Ray Serve is not installed.
    """

    def __init__(
        self,
        sd: Engine,
        loading: Mapping[str, Any],
        options: FleetOptions,
        max_waiting: int = 64,
        nets: Nets | None = None,
    ) -> None:
        super().__init__(max_waiting)
        self.sd, self.options, self.nets = sd, options, Nets(sd) if nets is None else nets
        most = options.most_replicas or options.replicas
        self._threads = ThreadPoolExecutor(max_waiting + most * options.ongoing, "twinstream-fleet")
        start_ray(options.address)
        from ray import serve

        self._serve = serve
        self.change_model(loading)

    def change_model(self, loading: Mapping[str, Any]) -> None:
        """Let other replicas take over, one after the other; what runs is finished by those that began it.

        The fleet's ``sd`` goes on checking requests, so the models must be of one kind.
        """
        options = self.options
        scaling: dict[str, Any] = {"num_replicas": options.replicas}
        if options.most_replicas is not None:
            scaling = {
                "autoscaling_config": {
                    "min_replicas": options.replicas,
                    "max_replicas": options.most_replicas,
                    "target_ongoing_requests": max(1, options.ongoing // 2),
                }
            }
        deployment = self._serve.deployment(
            name=_NAME,
            max_ongoing_requests=options.ongoing,
            ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
            health_check_period_s=2,
            health_check_timeout_s=30,
            graceful_shutdown_timeout_s=60,
            **scaling,
        )(Replica)
        threads = max(1, round(options.cpus))
        app = deployment.bind(dict(loading), threads, options.max_rows, self.nets.files)
        self._handle = self._serve.run(app, name=_NAME, route_prefix=None)

    def submit(
        self,
        prompt: str | Sequence[str],
        *,
        client: str = "",
        deadline: float | None = None,
        callback: Any = None,
        **options: Any,
    ) -> Queued:
        """See ``Scheduler.submit``; what the replica refuses, by its deadline too, is the job's error."""
        due = None if deadline is None else time.time() + check_number("deadline", deadline, 0.0)
        asked = make_options(Options, "submit", {"progress": False, "callback": callback} | options)
        request = make_request(self.sd.limits, prompt, asked)
        seeds = list(request.seeds)  # drawn here, so that a second try draws the same picture
        packed = self.nets.packed(options)
        with self._changed:
            self._check_open()
            job = Queued(self)
            self._jobs.append(job)
        given = packed | {"progress": False, "seed": seeds}
        self._threads.submit(self._run, job, (prompt, client, due, given), callback)
        return job

    def close(self, cancel: bool = False) -> None:
        """Take no more requests, and wait for those that are there; ``cancel`` cancels them instead."""
        self._stop_taking(cancel)
        self._threads.shutdown()
        self._serve.delete(_NAME)

    def _run(self, job: Queued, asked: tuple[Any, ...], callback: Any) -> None:
        """One request, on as many replicas as die of it or beside it, up to five."""
        from ray.exceptions import RayActorError, RayTaskError

        outcome: Result | BaseException | None = None
        for tries in range(_MOST_TRIES):
            try:
                outcome = self._draw(job, asked, callback)
                break
            except RayTaskError as error:  # what the replica raised
                outcome = error.cause if isinstance(error.cause, BaseException) else error
                break
            except RayActorError as error:
                outcome = error
                time.sleep(0.2 * 2**tries)
            except Exception as error:
                outcome = error
                break
        with self._changed:
            self._jobs.remove(job)
        if not job.set_running_or_notify_cancel():
            self.counts["cancelled"] += 1
        elif isinstance(outcome, Result):
            self.counts["done"] += 1
            job.set_result(outcome)
        else:
            self.counts["failed"] += 1
            job.set_exception(outcome or RuntimeError("the replica gave no result"))

    def _draw(self, job: Queued, asked: tuple[Any, ...], callback: Any) -> Result | None:
        answers: Any = self._handle.options(stream=True).draw.remote(*asked)
        for answer in answers:
            if job.cancelled():
                answers.cancel()
                return None
            if isinstance(answer, Result):
                return answer
            job.has_begun = True
            step, total, latents = answer
            if callback is not None:
                callback(step, total, latents)
        return None
