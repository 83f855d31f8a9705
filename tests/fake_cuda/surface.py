"""What stands in for ``torch.cuda`` and for launches while a ``FakeCuda`` is there."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._device import _device_constructors

from engine.kernels.jit import load_kernels
from tests.fake_cuda.card import Card, CudaError, Graph, Queue
from tests.fake_cuda.tensors import _CARD, FakeKernel, OnCard, card

_NAME, _CAPABILITY = "Imaginary 9000", (9, 0)
_PROPERTIES = SimpleNamespace(
    name=_NAME, major=9, minor=0, multi_processor_count=132, L2_cache_size=1 << 16, total_memory=80 << 30,
    shared_memory_per_block_optin=227 << 10,
)  # fmt: skip


class FakeCuda:
    """A context in which torch sees the card; gives its ``Card``, made of these arguments."""

    def __init__(self, **state: Any) -> None:
        self.card, self._stack = Card(**state), ExitStack()

    def __enter__(self) -> Card:
        load_kernels()
        torch._C._ensureCUDADeviceGuardSet()
        library = torch.library.Library("aten", "IMPL", "CUDA")
        self._stack.callback(library._destroy)
        library.impl("empty.memory_format", _empty)
        library.impl("empty_strided", _empty_strided)
        _CARD.append(self.card)
        self._stack.callback(_CARD.pop)
        for name, value in _SURFACE.items():
            self._stack.enter_context(patch.object(torch.cuda, name, value, create=True))
        _device_constructors()  # torch keeps what it finds when first asked, for good: the real ones
        for make in (torch.tensor, torch.as_tensor, torch.arange, torch.eye):
            self._stack.enter_context(patch.object(torch, make.__name__, _from_host(make)))
        clear = self.card.workspaces.clear
        self._stack.enter_context(patch.object(torch._C, "_cuda_clearCublasWorkspaces", clear, create=True))
        for module in [module for name, module in sys.modules.items() if name.startswith("engine.kernels.")]:
            for name, kernel in list(vars(module).items()):
                if name.endswith("_kernel"):
                    self._stack.enter_context(patch.object(module, name, FakeKernel(name, kernel)))
        return self.card

    def __exit__(self, *_: Any) -> None:
        self._stack.close()


def _from_host(make: Any) -> Any:
    """A factory that fills its result past all that could tell it of the card: made on the CPU, and copied."""

    def made(*args: Any, device: Any = None, **options: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != "cuda":
            return make(*args, **options) if device is None else make(*args, device=device, **options)
        if isinstance(args[0], torch.Tensor):
            return args[0].to(device=device, **options)
        return make(*args, device="cpu", **options).to(device)

    return made


def _index(device: Any) -> int:
    if device is None:
        return card().device
    if isinstance(device, int):
        return device if device >= 0 else card().device
    where = torch.device(device)
    return card().device if where.index is None else where.index


def _empty(size: Any, dtype: Any = None, device: Any = None, memory_format: Any = None, **_: Any) -> OnCard:
    made = torch.empty(size, dtype=dtype, device="cpu", memory_format=memory_format or torch.contiguous_format)
    return _placed(made, device)


def _empty_strided(size: Any, stride: Any, dtype: Any = None, device: Any = None, **_: Any) -> OnCard:
    return _placed(torch.empty_strided(size, stride, dtype=dtype, device="cpu"), device)


def _placed(made: torch.Tensor, device: Any) -> OnCard:
    card().fresh([made.untyped_storage().data_ptr()])
    return OnCard(made, _index(device))


class Stream:
    def __init__(self, device: Any = None, priority: int = 0, queue: Queue | None = None) -> None:  # noqa: ARG002
        self.queue = queue or card().new_queue(_index(device))
        self.device, self.stream_id = torch.device("cuda", self.queue.device), self.queue.number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.queue is self.queue

    def __hash__(self) -> int:
        return id(self.queue)

    def wait_stream(self, other: Stream) -> None:
        self.queue.after(other.queue.seen, other.queue.seconds)

    def wait_event(self, event: Event) -> None:
        self.queue.after(event.seen, event.seconds)

    def synchronize(self) -> None:
        card().wait([self.queue])


class Event:
    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.timed, self.seen, self.seconds = enable_timing, None, 0.0

    def record(self, stream: Stream | None = None) -> None:
        queue = (stream or _current_stream()).queue
        self.seen, self.seconds = queue.seen.copy(), queue.seconds

    def synchronize(self) -> None:
        with card().lock:
            card().host |= self.seen

    def elapsed_time(self, end: Event) -> float:
        if not (self.timed and end.timed):
            raise CudaError("events were made without timing")
        return (end.seconds - self.seconds) * 1e3


class _OnDevice:
    """``torch.cuda.device``."""

    def __init__(self, device: Any) -> None:
        self.index = _index(device)

    def __enter__(self) -> None:
        self.before, card().device = card().device, self.index

    def __exit__(self, *_: Any) -> None:
        card().device = self.before


class _OnStream:
    """``torch.cuda.stream``: its device becomes the current one, too."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        now, queue = card(), self.stream.queue
        self.device, self.before = now.device, now.queue(queue.device)
        now.device = queue.device
        now.current[queue.device] = queue

    def __exit__(self, *_: Any) -> None:
        card().current[self.stream.queue.device] = self.before
        card().device = self.device


class CUDAGraph:
    def __init__(self) -> None:
        self.graph = Graph(card())

    def replay(self) -> None:
        self.graph.replay()


class _Capturing:
    """``torch.cuda.graph``, with its process-wide stream of whichever device captured first."""

    default: Stream | None = None

    def __init__(
        self, cuda_graph: CUDAGraph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> None:
        if stream is None and (self.default is None or self.default.queue.card is not card()):
            _Capturing.default = Stream()
        self.graph, self.pool, self.mode = cuda_graph.graph, pool, capture_error_mode
        self.stream = stream or self.default
        self.on_stream = _OnStream(self.stream)

    def __enter__(self) -> None:
        if self.mode != "thread_local":
            card().problems.append(f"capture_error_mode is {self.mode}, in which other threads may not allocate")
        _empty_cache()
        self.on_stream.__enter__()
        self.graph.begin(object() if self.pool is None else self.pool)
        self.graph.device = self.stream.queue.device
        self.stream.queue.graph = self.graph

    def __exit__(self, *_: Any) -> None:
        self.stream.queue.graph = None
        self.on_stream.__exit__()


def _current_stream(device: Any = None) -> Stream:
    return Stream(queue=card().queue(_index(device)))


def _empty_cache() -> None:
    if any(queue.graph is not None for queues in card().queues for queue in queues):
        card().problems.append("the cache was emptied while a graph was captured")


def _device_of(x: torch.Tensor) -> _OnDevice:
    return _OnDevice(x.device.index if x.is_cuda else None)


_SURFACE: dict[str, Any] = {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "is_bf16_supported": lambda *_, **__: True,
    "device_count": lambda: card().devices,
    "current_device": lambda: card().device,
    "set_device": lambda device: setattr(card(), "device", _index(device)),
    "device": _OnDevice,
    "device_of": _device_of,
    "get_device_name": lambda *_: _NAME,
    "get_device_capability": lambda *_: _CAPABILITY,
    "get_device_properties": lambda *_: _PROPERTIES,
    "mem_get_info": lambda *_: (40 << 30, 80 << 30),
    "memory_allocated": lambda *_: 0,
    "max_memory_allocated": lambda *_: 0,
    "memory_reserved": lambda *_: 0,
    "reset_peak_memory_stats": lambda *_: None,
    "empty_cache": _empty_cache,
    "synchronize": lambda device=None: card().wait(card().queues[_index(device)]),
    "Stream": Stream,
    "Event": Event,
    "stream": _OnStream,
    "current_stream": _current_stream,
    "default_stream": lambda device=None: Stream(queue=card().queues[_index(device)][0]),
    "CUDAGraph": CUDAGraph,
    "graph": _Capturing,
    "graph_pool_handle": object,
}
