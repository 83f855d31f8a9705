"""What the card is doing: queues of work in an order, graphs, launches, time, and what it was told to do wrong."""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

_POOLED = 32  # streams that torch hands out in turn, on each device
_FAILURE = "CUDA error: an illegal memory access was encountered"


class CudaError(RuntimeError):
    """As torch raises for what a launch does wrong."""


class Queue:
    """A stream of one device. ``seen`` is how much of every queue's work has been done when its next work begins."""

    def __init__(self, card: Card, device: int, number: int) -> None:
        self.card, self.device, self.number = card, device, number
        self.key = (device, number)
        self.seen: Counter[Hashable] = Counter()
        self.seconds = 0.0
        self.graph: Graph | None = None  # that it captures into

    def after(self, seen: Counter[Hashable], seconds: float) -> None:
        self.seen |= seen  # Counter's union takes the larger of both
        self.seconds = max(self.seconds, seconds)


@dataclass(frozen=True)
class Launch:
    """A kernel of ours as it was launched."""

    kernel: str
    device: int
    queue: int
    captured: bool
    replayed: bool = False


@dataclass
class Work:
    """What is given to a queue: what to compute, what it reads and writes, and how long it takes."""

    name: str
    compute: Callable[[], Any]
    reads: tuple[Hashable, ...]
    writes: tuple[Hashable, ...]
    seconds: float
    launches: tuple[str, ...] = ()


class Graph:
    """What was captured, in order."""

    def __init__(self, card: Card) -> None:
        self.card, self.work, self.device, self.pool = card, [], 0, None
        self.work: list[Work]

    def begin(self, pool: Any) -> None:
        self.pool = pool
        self.card.graphs.add(self)
        self.card.live_graphs[pool] += 1
        weakref.finalize(self, self.card.live_graphs.subtract, {pool: 1})

    def replay(self) -> None:
        card = self.card
        queue = card.queue(self.device)
        if queue.graph is not None:
            raise CudaError("operation not permitted when stream is capturing")
        for work in self.work:
            card.do(queue, work, replayed=True)
        card.replays += 1


@dataclass
class Card:
    """The state of all devices.

    Attributes:
        devices: how many there are.
        interpreted: whether kernels run in Triton's interpreter; their operators' references stand in for them if not.
        seconds: how long what has this name takes, a kernel or an ATen operation; 1 microsecond else.
        faults: by kernel, what it does wrong: "fail", "hang", "die", "nan", "wrong", "fickle" or "outside".
        empty_captures: whether what is captured is lost.
        launches: of our kernels, in order.
        operations: names of the ATen operations that ran, with the dtypes that they were given.
        races: accesses that nothing puts in an order.
        problems: other things that a real card would not forgive.
        convolutions: benchmark, deterministic and TF32 of each.
        live_graphs: by memory pool.
    """

    devices: int = 2
    interpreted: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    empty_captures: bool = False
    launches: list[Launch] = field(default_factory=list)
    operations: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    convolutions: list[tuple[bool, bool, bool]] = field(default_factory=list)
    races: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    live_graphs: Counter[Any] = field(default_factory=Counter)
    replays: int = 0

    def __post_init__(self) -> None:
        self.local = threading.local()
        self.lock = threading.RLock()
        self.host: Counter[Hashable] = Counter()  # what the host has waited for, in whichever thread
        self.queues = [[Queue(self, device, n) for n in range(_POOLED + 1)] for device in range(self.devices)]
        self.handed_out = [0] * self.devices
        self.written: dict[Hashable, tuple[Hashable, int]] = {}
        self.read: dict[Hashable, Counter[Hashable]] = {}
        self.workspaces: dict[Hashable, tuple[int, Any]] = {}
        self.n_workspaces = 0
        self.times_run: Counter[str] = Counter()
        self.graphs: weakref.WeakSet[Graph] = weakref.WeakSet()
        self.lost = False  # as a context is after an illegal access

    @property
    def device(self) -> int:
        return getattr(self.local, "device", 0)

    @device.setter
    def device(self, device: int) -> None:
        self.local.device = device

    def queue(self, device: int | None = None) -> Queue:
        """The current one of a device, in this thread."""
        device = self.device if device is None else device
        return self.current.get(device, self.queues[device][0])

    @property
    def current(self) -> dict[int, Queue]:
        if not hasattr(self.local, "queues"):
            self.local.queues = {}
        return self.local.queues

    def new_queue(self, device: int) -> Queue:
        with self.lock:
            self.handed_out[device] += 1
            return self.queues[device][1 + (self.handed_out[device] - 1) % _POOLED]

    def workspace(self, queue: Queue) -> Hashable:
        """cuBLAS' of a stream, which is taken when first needed and kept."""
        pool = None if queue.graph is None else queue.graph.pool
        if queue.key not in self.workspaces:
            self.n_workspaces += 1
            self.workspaces[queue.key] = self.n_workspaces, pool
        number, owner = self.workspaces[queue.key]
        if owner is not pool:
            self.problems.append(f"workspace {number} is of pool {owner}, and work of pool {pool} writes to it")
        return "workspace", number

    def fresh(self, addresses: Iterable[Hashable]) -> None:
        """Memory that was allocated just now."""
        with self.lock:
            for address in addresses:
                self.written.pop(address, None)
                self.read.pop(address, None)

    def give(self, queue: Queue, work: Work) -> None:
        """Have work done, or recorded where the queue captures."""
        if queue.graph is None:
            self.do(queue, work)
        else:
            self.launches += [Launch(name, queue.device, queue.number, captured=True) for name in work.launches]
            if not self.empty_captures:
                queue.graph.work.append(work)

    def do(self, queue: Queue, work: Work, replayed: bool = False) -> None:
        with self.lock:
            self._check()
            queue.after(self.host, 0.0)
            queue.seen[queue.key] += 1
            queue.seconds += work.seconds
            for address in work.reads:
                self._ordered(queue, address, work.name, [self.written.get(address)])
                self.read.setdefault(address, Counter())[queue.key] = queue.seen[queue.key]
            for address in work.writes:
                self._ordered(queue, address, work.name, [self.written.get(address), *self._reads(address)])
                self.written[address] = queue.key, queue.seen[queue.key]
                self.read.pop(address, None)
            self.launches += [Launch(name, queue.device, queue.number, False, replayed) for name in work.launches]
            work.compute()

    def _check(self) -> None:
        if self.lost:
            raise CudaError(_FAILURE)

    def _reads(self, address: Hashable) -> list[tuple[Hashable, int]]:
        return list(self.read.get(address, {}).items())

    def _ordered(self, queue: Queue, address: Hashable, name: str, before: list[tuple[Hashable, int] | None]) -> None:
        for access in before:
            if access is not None and queue.seen[access[0]] < access[1]:
                self.races.append(f"{name} on {queue.key} does not wait for {access[0]} at {address}")

    def wait(self, queues: Iterable[Queue]) -> None:
        """The host waits for all that queues have been given."""
        with self.lock:
            self._check()
            for queue in queues:
                if queue.graph is not None:
                    raise CudaError("operation not permitted when stream is capturing")
                self.host |= queue.seen

    def misbehave(self, kernel: str) -> str | None:
        """What a kernel was told to do wrong, where that does not happen here."""
        self.times_run[kernel] += 1
        fault = self.faults.get(kernel)
        if fault == "fail":
            self.lost = True
            raise CudaError(_FAILURE)
        if fault == "hang":
            time.sleep(3600)
        if fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return fault

    def kernels(self) -> Counter[str]:
        """How often each kernel of ours has run, at replays too."""
        return Counter(launch.kernel for launch in self.launches if not launch.captured)
