"""CUDA graphs: a function of tensors captured once per shape of its arguments, and replayed from fixed buffers.

A replay costs one launch where eager code issues hundreds. A graph has buffers for all that its function reads: for the
constants of a request, which are written when another request's are in them, and for what changes from call to call.
Texts, concepts, strengths, schedules and positions are values in these buffers, so none of them captures anything anew.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..warn import warn

Function = Callable[[Any, Any], Any]
Run = Callable[[str, Function, Any, Any], Any]  # name, function, constants, inputs -> the function's tensors
Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]  # -> replay, and where it leaves its results

_CAPTURING = threading.Lock()  # torch captures one graph at a time in a process, and none while it empties its cache
_WARM_UP_CALLS = 3
_MAX_GRAPHS = 32
_POOLS = 4  # that so many graphs are in: what a pool has taken, it gives back with the last of its graphs
_AGREE = 1e-2  # relative: a replay may sum in another order; one that reads other memory errs by its inputs


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


def empty_cache() -> None:
    """Give back what torch keeps of a GPU's memory; not while another thread captures, whose graph that would spoil."""
    with _CAPTURING:
        torch.cuda.empty_cache()


class CudaCapture:
    """Captures into one memory pool, which is enough as long as no two of its graphs run at the same time.

    The stream is one of this device: torch's own is of the device that captured first, and what another device is given
    while that one captures is in no graph.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()  # one for all: each stream has cuBLAS workspaces of its own
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        with _CAPTURING, torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                for _ in range(_WARM_UP_CALLS):
                    function()
            current.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            # other threads may allocate meanwhile
            capturing = torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local")
            with _own_workspaces(), capturing:
                results = function()
        return graph.replay, results


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """Have cuBLAS take its workspace from the pool that is captured into.

    It has one for each stream, and torch hands the same 32 streams out again and again: two Engines' graphs, replayed
    at the same time, might otherwise both write into what their capture streams had in common.
    """
    clear: Any = torch._C._cuda_clearCublasWorkspaces
    clear()
    try:
        yield
    finally:
        clear()


@dataclass(slots=True)
class _Graph:
    """A captured function: its buffers, and whose constants are in them."""

    constants: Any
    inputs: Any
    replay: Callable[[], None]
    results: Any
    held: Any
    capture: Capture


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
    its name and the shapes, dtypes and plain values of its arguments; nothing else that it reads may change. Beyond 32
    graphs, those of the memory pool that was used longest ago are dropped.

    Every graph is proven before it serves: with other inputs than it was captured with, it must give what the function
    gives. Where one does not, or cannot be captured, a warning says so, and functions are called without graphs from
    then on; ``failed`` keeps the reason.

    Args:
        make_capture: makes what captures, as ``CudaCapture`` does, for each memory pool.
    """

    def __init__(self, make_capture: Callable[[], Capture]) -> None:
        self.make_capture, self.capture = make_capture, make_capture()
        self.captured: list[Captured] = []  # all that ever were, in order
        self.failed: str | None = None
        self._graphs: dict[Hashable, _Graph] = {}
        self._lock = threading.Lock()
        self._done: torch.cuda.Event | None = None

    def __len__(self) -> int:
        return len(self._graphs)

    @torch.inference_mode(False)  # which would make buffers that nobody may write outside of it
    @torch.no_grad()
    def __call__(self, name: str, function: Function, constants: Any, inputs: Any) -> Any:
        """The function's results, which stay the caller's own."""
        key, like = (name, signature(constants), signature(inputs)), next(_tensors(inputs))
        with self._lock, torch.cuda.device_of(like):
            if self._done is not None:  # a thread on another stream may have come before
                torch.cuda.current_stream().wait_event(self._done)
            graph = self._graphs.pop(key, None) or self._capture(name, function, constants, inputs)
            if graph is not None:
                self._graphs[key] = graph
                self._drop()
                if graph.held is not constants:
                    _write(graph.constants, constants)
                    graph.held = constants
                _write(graph.inputs, inputs)
                graph.replay()
                results = changed(graph.results, torch.clone)
                if like.is_cuda:
                    self._done = torch.cuda.Event()
                    self._done.record()
                return results
        return function(constants, inputs)

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        with self._lock:
            self._wait()
            self._graphs.clear()
            self.capture = self.make_capture()

    def _drop(self) -> None:
        """Where graphs are too many, those of the pool whose last use is longest ago: memory is a pool's."""
        while len(self._graphs) > _MAX_GRAPHS:
            self._wait()
            last_use = {id(graph.capture): i for i, graph in enumerate(self._graphs.values())}
            oldest = min(last_use, key=lambda capture: last_use[capture])
            self._graphs = {key: graph for key, graph in self._graphs.items() if id(graph.capture) != oldest}

    def _wait(self) -> None:
        """Until no stream replays: buffers may have been allocated on another than the last."""
        if self._done is not None:
            self._done.synchronize()

    def _capture(self, name: str, function: Function, constants: Any, inputs: Any) -> _Graph | None:
        if self.failed is not None:
            return None
        start = time.perf_counter()
        if sum(graph.capture is self.capture for graph in self._graphs.values()) >= _MAX_GRAPHS // _POOLS:
            self.capture = self.make_capture()
        constants_here, inputs_here = changed(constants, torch.clone), changed(inputs, torch.clone)
        try:
            replay, results = self.capture(lambda: function(constants_here, inputs_here))
            graph = _Graph(constants_here, inputs_here, replay, results, constants, self.capture)
            wrong = _is_wrong(graph, function)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            graph, wrong = None, f"capturing failed: {error}"
        if wrong is not None:
            self.failed = f"{name}: {wrong}"
            self._wait()
            self._graphs.clear()
            warn(f"steps run without CUDA graphs from now on; {self.failed}", RuntimeWarning)
            return None
        self.captured.append(Captured(name, time.perf_counter() - start))
        return graph


def _is_wrong(graph: _Graph, function: Function) -> str | None:
    """What is wrong with a graph: results spoilt and inputs changed, it must do as its function does."""
    for x in _tensors(graph.inputs):
        if x.is_floating_point():
            x.mul_(0.5)
    kept = {x.untyped_storage().data_ptr() for tree in (graph.inputs, graph.constants) for x in _tensors(tree)}
    for x in _tensors(graph.results):
        if x.untyped_storage().data_ptr() not in kept:
            x.fill_(math.nan if x.is_floating_point() else 0)
    graph.replay()
    for ours, eager in zip(_tensors(graph.results), _tensors(function(graph.constants, graph.inputs)), strict=True):
        finite = torch.isfinite(eager)
        if not torch.equal(torch.isfinite(ours), finite):
            return "a replay left results out"
        difference = (ours.double() - eager.double())[finite].norm()
        if difference > _AGREE * eager.double()[finite].norm():
            return f"a replay with other inputs gave other results than eager code, by {float(difference):.2g}"
    return None


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
