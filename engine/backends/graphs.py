"""CUDA graphs: a function of tensors captured once per shape of its arguments, and replayed from fixed buffers.

A replay costs one launch where eager code issues hundreds. A graph has buffers for all that its function reads: for the
constants of a request, which are written when another request's are in them, and for what changes from call to call.
Texts, concepts, strengths, schedules and positions are values in these buffers, so none of them captures anything anew.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

Function = Callable[[Any, Any], Any]
Run = Callable[[str, Function, Any, Any], Any]  # name, function, constants, inputs -> the function's tensors
Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]  # -> replay, and where it leaves its results

CAPTURING = threading.Lock()  # torch captures one graph at a time in a process, and none while it empties its cache
_WARM_UP_CALLS = 3
_MAX_GRAPHS = 32


def run_eagerly(_name: str, function: Function, constants: Any, inputs: Any) -> Any:
    """Call the function, without a graph."""
    return function(constants, inputs)


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """On a GPU, a stream beside the default one, after what that has been given; the caller waits for what it does."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        yield


class CudaCapture:
    """Captures into one memory pool, which is enough as long as no two of its graphs run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()  # one for all: each stream has cuBLAS workspaces of its own
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        cudnn: Any = torch.backends.cudnn
        with CAPTURING, torch.cuda.device(self.device):
            benchmark = cudnn.benchmark
            self.stream.wait_stream(torch.cuda.current_stream())
            try:
                cudnn.benchmark = not cudnn.deterministic  # chooses algorithms in the calls before the capture
                with torch.cuda.stream(self.stream):
                    for _ in range(_WARM_UP_CALLS):
                        function()
                torch.cuda.current_stream().wait_stream(self.stream)
                graph = torch.cuda.CUDAGraph()
                # other threads may allocate meanwhile
                with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                    results = function()
            finally:
                cudnn.benchmark = benchmark
        return graph.replay, results


@dataclass(slots=True)
class _Graph:
    """A captured function: its buffers, and whose constants are in them."""

    constants: Any
    inputs: Any
    replay: Callable[[], None]
    results: Any
    held: Any


@dataclass(frozen=True, slots=True)
class Captured:
    """What a capture cost: the function's name, and seconds."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Warmup:
    """What ``Engine.warmup`` prepared.

    Attributes:
        captured: the graphs it captured; none where they were there before, or the Engine runs without.
        seconds: of the whole run.
        memory_bytes: of the GPU, as reserved afterwards; None on a CPU.
    """

    captured: tuple[Captured, ...]
    seconds: float
    memory_bytes: int | None


class Graphs:
    """Runs functions through graphs of them; threads may share it.

    Constants are told apart by identity, and must not change while a run with them may follow. A function is told by
    its name and the shapes, dtypes and plain values of its arguments; nothing else that it reads may change. The least
    recently used of more than 32 graphs is dropped.

    Args:
        make_capture: makes what captures, as ``CudaCapture`` does; again after ``clear``, since a memory pool ends with
            the last of its graphs.
    """

    def __init__(self, make_capture: Callable[[], Capture]) -> None:
        self.make_capture, self.capture = make_capture, make_capture()
        self.captured: list[Captured] = []  # all that ever were, in order
        self._graphs: dict[Hashable, _Graph] = {}
        self._lock = threading.Lock()
        self._done: torch.cuda.Event | None = None

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(self, name: str, function: Function, constants: Any, inputs: Any) -> Any:
        """The function's results, which stay the caller's own."""
        key = (name, signature(constants), signature(inputs))
        with self._lock, torch.cuda.device_of(next(_tensors(inputs))):
            if self._done is not None:  # a thread on another stream may have come before
                torch.cuda.current_stream().wait_event(self._done)
            graph = self._graphs.pop(key, None) or self._capture(name, function, constants, inputs)
            self._graphs[key] = graph
            while len(self._graphs) > _MAX_GRAPHS:
                self._wait()
                del self._graphs[next(iter(self._graphs))]
            if graph.held is not constants:
                _write(graph.constants, constants)
                graph.held = constants
            _write(graph.inputs, inputs)
            graph.replay()
            results = changed(graph.results, torch.clone)
            if torch.cuda.is_available():
                self._done = torch.cuda.Event()
                self._done.record()
        return results

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        with self._lock:
            self._wait()
            self._graphs.clear()
            self.capture = self.make_capture()

    def _wait(self) -> None:
        """Until no stream replays: buffers may have been allocated on another than the last."""
        if self._done is not None:
            self._done.synchronize()

    def _capture(self, name: str, function: Function, constants: Any, inputs: Any) -> _Graph:
        start = time.perf_counter()
        constants_here, inputs_here = changed(constants, torch.clone), changed(inputs, torch.clone)
        replay, results = self.capture(lambda: function(constants_here, inputs_here))
        self.captured.append(Captured(name, time.perf_counter() - start))
        return _Graph(constants_here, inputs_here, replay, results, held=constants)


def signature(tree: Any) -> Hashable:
    """Shapes, dtypes and devices of the tensors in dataclasses and tuples, and all else as it is."""
    if isinstance(tree, Tensor):
        return tree.shape, tree.dtype, tree.device
    if is_dataclass(tree):
        return type(tree), tuple(signature(getattr(tree, field.name)) for field in fields(tree))
    return tuple(map(signature, tree)) if isinstance(tree, tuple) else tree


def changed(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same dataclasses and tuples with other tensors."""
    if isinstance(tree, Tensor):
        return change(tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{field.name: changed(getattr(tree, field.name), change) for field in fields(tree)})
    return tuple(changed(item, change) for item in tree) if isinstance(tree, tuple) else tree


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif is_dataclass(tree):
        for field in fields(tree):
            yield from _tensors(getattr(tree, field.name))
    elif isinstance(tree, tuple):
        for item in tree:
            yield from _tensors(item)


def _write(buffers: Any, values: Any) -> None:
    """Copy all tensors; both trees have one signature."""
    for target, source in zip(_tensors(buffers), _tensors(values), strict=True):
        target.copy_(source)
