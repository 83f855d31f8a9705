"""Tensors that say they are on a card, and are computed on the CPU in the order of its queues."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import register_pytree_node, tree_flatten, tree_map
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.fake_cuda.card import Card, Queue, Work

register_pytree_node(  # which a launch is given in place of a tensor
    TensorDescriptor,
    lambda one: ([one.base], (one.shape, one.strides, one.block_shape)),
    lambda bases, about: TensorDescriptor(next(iter(bases)), *about),
)
_CARD: list[Card] = []  # the one that is there
_PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm")
_MIX_DEVICES = ("aten.copy_", "aten._to_copy", "aten.index", "aten.index_put_")
_WAIT = ("aten._local_scalar_dense", "aten.equal", "aten.nonzero", "aten.masked_select", "aten.is_nonzero")
_SDPA = {  # which there are on GPUs only, and how many results they have
    "aten._scaled_dot_product_cudnn_attention": 9,
    "aten._scaled_dot_product_flash_attention": 9,
    "aten._scaled_dot_product_efficient_attention": 4,
}


_REFUSALS = ("not linked with support for cuda", "not supported for tensor subclasses")
_NAMES = {"__getitem__": "aten.index", "__setitem__": "aten.index_put_"}  # of Python's own methods
_NAMES |= dict.fromkeys(("item", "tolist", "__float__", "__int__", "__bool__", "__index__"), "aten._local_scalar_dense")


def card() -> Card:
    if not _CARD:
        raise RuntimeError("the fake card is gone, and a tensor of its is still used")
    return _CARD[-1]


class OnCard(Tensor):
    """A tensor on a device of the card; ``inner`` holds its values."""

    inner: Tensor
    index: int

    @staticmethod
    def __new__(cls, inner: Tensor, index: int) -> OnCard:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = Tensor._make_wrapper_subclass(cls, inner.shape, device=torch.device("cuda", index), **layout)
        made.inner, made.index = inner, index
        return made

    def __repr__(self, **_: Any) -> str:
        return f"on cuda:{self.index}: {self.inner}"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _give("aten.sdpa", F.scaled_dot_product_attention, args, kwargs)
        if func in (Tensor.untyped_storage, Tensor.data_ptr):
            return func(args[0].inner)
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        except RuntimeError as error:
            if not any(words in str(error) for words in _REFUSALS):
                raise
            # it asked for the device before anything else
            name = func.__name__
            return _give(_NAMES.get(name, f"aten.{name}"), func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.replace("::", ".")
        if name.startswith("twinstream."):
            return _give_operator(name, func, args, kwargs)
        if name in _SDPA:
            return _give(name, lambda q, k, v, *_, **given: _attention(q, k, v, given, _SDPA[name]), args, kwargs)
        return _give(name, func, args, kwargs)


def _attention(q: Tensor, k: Tensor, v: Tensor, given: dict[str, Any], n_results: int) -> tuple[Any, ...]:
    out = F.scaled_dot_product_attention(q, k, v, scale=given.get("scale"))
    rest: list[Any] = [q.new_empty(0) for _ in range(n_results - 1)]
    if n_results == 9:
        rest[3:5] = 0, 0  # the longest sequences
    return out, *rest


def on_card(tree: Any) -> list[OnCard]:
    return [x for x in tree_flatten(tree)[0] if isinstance(x, OnCard)]


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_flatten(tree)[0] if isinstance(x, Tensor)]


def inside(tree: Any) -> Any:
    return tree_map(lambda x: x.inner if isinstance(x, OnCard) else x, tree)


def addresses(some: Iterable[Tensor]) -> tuple[int, ...]:
    """Where in memory tensors (of the CPU) are, by storage."""
    return tuple({x.untyped_storage().data_ptr(): None for x in some if x.numel()})


def spoil(some: Iterable[Tensor]) -> None:
    """What a capture leaves: memory that nobody has written."""
    for x in some:
        x.fill_(math.nan if x.is_floating_point() else 0)


def _check_devices(name: str, args: Any, kwargs: Any) -> None:
    given = tensors((args, kwargs))
    devices = {x.device for x in given if isinstance(x, OnCard) or x.ndim}
    if name not in _MIX_DEVICES and len(devices) > 1:
        raise RuntimeError(f"{name}: expected all tensors to be on one device, found {devices}")


def _named(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    names = [one.name for one in func._schema.arguments]
    return dict(zip(names, args, strict=False)) | kwargs


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation writes into, of its arguments."""
    if not hasattr(func, "_schema"):
        return [args[0]] if func in (Tensor.__setitem__, Tensor.copy_) else []
    if not func._schema.is_mutable:
        return []
    named = _named(func, args, kwargs)
    return tensors(
        [named.get(one.name) for one in func._schema.arguments if one.alias_info and one.alias_info.is_write]
    )


def _give(name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Have an operation of torch's own done, or captured."""
    now, given = card(), on_card((args, kwargs))
    _check_devices(name, args, kwargs)
    target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    inner_args, inner_kwargs = inside((args, kwargs))
    if target is not None:
        inner_kwargs["device"] = torch.device("cpu")
    queues = [now.queue(index) for index in {x.index: None for x in given}]
    queue, written = queues[0], _written(func, inner_args, inner_kwargs)
    into_host = (target is not None and target.type == "cpu") or (name == "aten.copy_" and len(on_card(args)) == 1)
    waits = name in _WAIT or (into_host and not isinstance(args[0], OnCard)) or (into_host and name != "aten.copy_")
    if waits and queue.graph is not None:
        raise RuntimeError("operation not permitted when stream is capturing")
    for other in queues[1:]:  # a copy between devices
        queue.after(other.seen, other.seconds)
    kept = [x.clone() for x in written] if queue.graph is not None else []
    results = func(*inner_args, **inner_kwargs)
    for x, before in zip(written, kept, strict=False):
        x.copy_(before)  # a capture computes nothing
    known = addresses(x.inner for x in given)
    fresh = [x for x in tensors(results) if x.numel() and x.untyped_storage().data_ptr() not in known]
    fresh = [x for x in fresh if all(x is not other for other in written)]
    if fresh or written or waits:
        _order(name, func, (inner_args, inner_kwargs), given, queue, fresh, written)
    for other in queues[1:]:
        other.after(queue.seen, queue.seconds)
    if waits:
        now.wait([queue])
    for x in given:
        if x.shape != x.inner.shape:
            raise NotImplementedError(f"{name} changes a size, which a tensor of the fake card cannot")
    own = {id(x.inner): x for x in given} | {id(x): x for x in tensors((args, kwargs)) if not isinstance(x, OnCard)}
    to_host = target is not None and target.type == "cpu"
    index = given[0].index if target is None or target.index is None else target.index

    def outside(x: Any) -> Any:
        if not isinstance(x, Tensor) or to_host:
            return x
        return own.get(id(x)) if id(x) in own else OnCard(x, index)

    return tree_map(outside, results)


def _order(
    name: str, func: Any, call: tuple[Any, Any], given: list[OnCard], queue: Queue, fresh: list[Tensor],
    written: list[Tensor],
) -> None:  # fmt: skip
    """Tell the card what an operation read and wrote."""
    now = card()
    now.fresh(addresses(fresh))
    if "empty" in name:
        return  # memory is no work
    now.operations.append((name, tuple(x.dtype for x in given)))
    if name in ("aten.convolution", "aten._convolution"):
        named = _named(func, *call)
        flags = (named.get(flag) for flag in ("benchmark", "deterministic", "allow_tf32"))
        now.convolutions.append((given[0].dtype, *flags))
    writes: tuple[Any, ...] = addresses([*fresh, *written])
    if name in _PRODUCTS:
        writes += (now.workspace(queue),)
    reads = tuple(one for one in addresses(x.inner for x in given) if one not in writes)

    def again() -> None:
        args, kwargs = call
        for old, new in zip(fresh, tensors(func(*args, **kwargs)), strict=False):
            old.copy_(new)

    captures = queue.graph is not None
    now.give(queue, Work(name, again if captures else _nothing, reads, writes, now.seconds.get(name, 1e-6)))
    if captures:
        spoil(fresh)


def _nothing() -> None:
    pass


def _give_operator(name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """Have one of our operators run what is registered for CUDA; its launches compute by its reference."""
    now = card()
    _check_devices(name, args, kwargs)
    now.local.launched = launched = []
    try:
        results = func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **kwargs)
    finally:
        now.local.launched = None
    if not launched:
        return results
    out = [x.inner for x in on_card(results)]
    inner_args, inner_kwargs = inside((args, kwargs))
    queue, faults = launched[0][1], [fault for _, _, fault in launched if fault is not None]

    def compute() -> None:
        for target, exact in zip(out, tensors(func(*inner_args, **inner_kwargs)), strict=True):
            target.copy_(exact)
        for fault in faults:
            _spoil_as_told(fault, out, now.times_run[launched[0][0]])

    reads = tuple(one for one in addresses(x.inner for x in on_card((args, kwargs))) if one not in addresses(out))
    kernels = tuple(kernel for kernel, _, _ in launched)
    seconds = sum(now.seconds.get(kernel, 1e-6) for kernel in kernels)
    captures = queue.graph is not None
    now.give(queue, Work(name, compute, reads, addresses(out), seconds, kernels))
    if captures:
        spoil(out)
    return results


def _spoil_as_told(fault: str, out: list[Tensor], times_run: int) -> None:
    first = out[0]
    if fault == "nan":
        first.view(-1)[-1:].fill_(math.nan) if first.is_contiguous() else first.fill_(math.nan)
    elif fault == "wrong":
        first.mul_(1.05)
    elif fault == "fickle":
        first.mul_(1 + 2.4e-7 * (times_run % 2))  # two bits of float32
    elif fault == "outside":
        whole = first.as_strided((first.untyped_storage().nbytes() // first.itemsize,), (1,), 0)
        whole[first.storage_offset() - 1 :][:1] = 7.0
    else:
        raise ValueError(f"fault must be one of Card.faults, got {fault!r}")


class FakeKernel:
    """A kernel of ours whose launches are the card's."""

    def __init__(self, name: str, interpreted: Any) -> None:
        self.name, self.interpreted = name, interpreted

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **constants: self._launch(grid, args, constants)

    def _launch(self, grid: Any, args: Any, constants: dict[str, Any]) -> None:
        now = card()
        given = tensors(args)
        if not all(isinstance(x, OnCard) for x in given):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        queue = now.queue()  # of the current device, whatever the tensors' is
        if any(x.device.index != queue.device for x in given):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        fault = now.misbehave(self.name)
        launched = getattr(now.local, "launched", None)
        if launched is not None and not now.interpreted:
            launched.append((self.name, queue, fault))
            return
        inner = inside(args)
        seconds, reads = now.seconds.get(self.name, 1e-6), addresses(tensors(inner))
        run = self.interpreted[grid]
        now.give(queue, Work(self.name, lambda: run(*inner, **constants), reads, (), seconds, (self.name,)))
