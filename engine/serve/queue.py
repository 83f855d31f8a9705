"""What a ``Scheduler`` and a ``Fleet`` have in common: a bounded line of requests, and what is told of it."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import Future
from typing import Generic, TypeVar

from ..checks import check_integer
from ..errors import QueueFullError, SchedulerClosedError
from ..result import Result


class Queued(Future[Result]):
    """A request in a queue: a future of its result.

    Attributes:
        has_begun: whether its first step was begun.
    """

    def __init__(self, queue: Queue) -> None:
        super().__init__()
        self._queue, self.has_begun = queue, False

    @property
    def position(self) -> int | None:
        """1 for the request that begins next, and so on; 0 while it is being drawn, None when it is done."""
        return self._queue.position(self)

    def running(self) -> bool:
        return self.has_begun and not self.done()


J = TypeVar("J", bound=Queued)


class Queue(Generic[J]):
    """Requests that wait or are drawn, in the order in which they came.

    Args:
        max_waiting: requests that wait for their first step; more are refused.

    Attributes:
        counts: "done", "failed", "cancelled", "refused"; of those who step themselves also "steps" and their "rows".
        step_seconds: that these took.
    """

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = check_integer("max_waiting", max_waiting, 1)
        self.counts: Counter[str] = Counter()
        self.step_seconds = 0.0
        self._changed = threading.Condition()
        self._jobs: list[J] = []
        self._closing = False

    @property
    def is_open(self) -> bool:
        """Whether it takes requests."""
        return not self._closing

    @property
    def waiting(self) -> int:
        """How many requests wait for their first step."""
        with self._changed:
            return sum(not one.has_begun for one in self._jobs)

    @property
    def drawing(self) -> int:
        """How many requests are being drawn."""
        with self._changed:
            return sum(one.has_begun for one in self._jobs)

    def position(self, job: Queued) -> int | None:
        """See ``Queued.position``."""
        with self._changed:
            waiting: list[Queued] = [one for one in self._jobs if not one.has_begun and not one.done()]
            return None if job.done() else waiting.index(job) + 1 if job in waiting else 0

    def _check_open(self) -> None:
        """Refuse where a request cannot be taken."""
        if self._closing:
            name = type(self).__name__.lower()
            raise SchedulerClosedError(f"the {name} has been closed: make another, or submit before it is")
        if self.waiting >= self.max_waiting:
            self.counts["refused"] += 1
            rule = f"at most {self.max_waiting} requests may wait for their first step"
            after = self._seconds_to_room()
            raise QueueFullError(f"{rule}, and so many do; try again in {after:.2g} s", after)

    def _seconds_to_room(self) -> float:
        """When there is likely to be room."""
        return 1.0

    def _stop_taking(self, cancel: bool) -> None:
        """Take no more requests, and cancel those that are there or leave them."""
        with self._changed:
            self._closing = True
            left = list(self._jobs) if cancel else []
            self._changed.notify_all()
        for job in left:
            job.cancel()
