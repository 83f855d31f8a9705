"""Inputs that are hard to get right, in memory with guard bands around it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .calls import Call, reference

_GUARD = 512  # elements on either side, which keep the memory between them as aligned as torch's own
_PEAK = 10.0  # queries are so much larger in every second row: the softmax is nearly an argmax there
_MEAN = 30.0  # what normalisations must subtract exactly
_GATES = (1.0, 10.0, 10.0, 500.0)  # DCI's, as calibrated


def make_inputs(call: Call, device: torch.device, seed: int = 0) -> list[Any]:
    """Arguments for a call on a device, with its strides."""
    generator = torch.Generator().manual_seed(seed)
    names = list(inspect.signature(reference(call.op)).parameters)
    made = []
    for name, like in zip(names, call.arguments, strict=False):
        if isinstance(like, Tensor):
            made.append(_placed(_values(call.op, name, like, made, device, generator), like, device))
        else:
            made.append(like)
    return made


_INDICES: dict[str, Callable[[Tensor, list[Any]], Tensor]] = {  # like what, and the arguments before it
    "tokens": lambda like, before: (5 + torch.arange(like.shape[1])).expand(like.shape) % before[1].shape[1],
    "leaders": lambda like, before: torch.arange(len(like)) % len(before[1]),
    "lengths": lambda like, before: torch.full(like.shape, max(1, min(8, before[1].shape[1] - 2))),
    "chosen": lambda like, _: torch.arange(like.shape[1]).expand(like.shape) == 1,
    "gates": lambda like, _: torch.tensor(_GATES).expand(like.shape),
}


def _values(
    op: str, name: str, like: Tensor, before: list[Any], device: torch.device, generator: torch.Generator
) -> Tensor:
    """Values for one argument; ``before`` are those of the arguments before it."""
    if name in _INDICES:
        return _INDICES[name](like, before)
    # drawn where they are used: the numbers are many, and which they are does not matter
    torch.manual_seed(int(torch.randint(1 << 30, (), generator=generator)))
    drawn = torch.randn(like.shape, device=device, dtype=torch.float32)
    if name == "q":
        return (
            drawn * torch.linspace(1.0, _PEAK, 2, device=device).repeat(-(-like.shape[1] // 2))[: like.shape[1], None]
        )
    if name == "x" and "norm" in op:
        return drawn + _MEAN
    if name in ("weight", "z_weight") and like.ndim == 2:
        return drawn * like.shape[1] ** -0.5
    return drawn.sigmoid() if name == "columns" else drawn


def _placed(values: Tensor, like: Tensor, device: torch.device) -> Tensor:
    """Values in memory as ``like`` has it, between guard bands."""
    inside = _between_guards(like, device)
    return inside.copy_(values.to(device=device, dtype=like.dtype))


def _between_guards(like: Tensor, device: torch.device) -> Tensor:
    """Unwritten memory of this shape and stride; NaN where numbers can be, all around and between its rows."""
    span = 1 + sum((n - 1) * stride for n, stride in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
    spoilt = math.nan if like.is_floating_point() else 0
    whole = torch.full((span + 2 * _GUARD,), spoilt, dtype=like.dtype, device=device)
    return whole.as_strided(like.shape, like.stride(), _GUARD)


def copies(inputs: list[Any]) -> list[Any]:
    """The same arguments in other memory, with their guards."""
    return [_placed(x, x, x.device) if isinstance(x, Tensor) else x for x in inputs]


def is_guarded(x: Tensor) -> bool:
    """Whether the bands around an argument, or a result between guards, are as they were."""
    if not x.is_floating_point() or not x.numel():
        return True
    whole = x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)
    bands = torch.cat([whole[:_GUARD], whole[-_GUARD:]])
    return bool(bands.isnan().all())


@contextmanager
def guarding() -> Iterator[list[Tensor]]:
    """Has what launchers allocate meanwhile lie between guards, full of NaN; gives the list of it.

    For a process that runs nothing beside: it changes how torch allocates.
    """
    made: list[Tensor] = []

    def guarded(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_between_guards(*args: Any, **kwargs: Any) -> Tensor:
            like = allocate(*args, **kwargs)
            inside = _between_guards(like, like.device)
            if inside.is_floating_point():
                inside.fill_(math.nan)
            made.append(inside)
            return inside

        return allocate_between_guards

    places = ((torch.Tensor, "new_empty"), (torch, "empty_like"), (torch, "empty"))
    before = [getattr(owner, name) for owner, name in places]
    try:
        for (owner, name), allocate in zip(places, before, strict=True):
            setattr(owner, name, guarded(allocate))
        yield made
    finally:
        for (owner, name), allocate in zip(places, before, strict=True):
            setattr(owner, name, allocate)
