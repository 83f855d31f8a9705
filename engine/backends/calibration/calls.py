"""Calls of operations: what of their arguments decides which implementation is right and fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ops import TORCH, Ops

Key = tuple[Any, ...]

# By op, the arguments with an entry a row of the batch. A choice holds for any number of rows; see ``serve.Served``.
ROW_ARGUMENTS: dict[str, tuple[int, ...]] = {
    "attention": (0, 1, 2),
    "cross_attention": (0, 1, 2, 3),
    "residual_apply": (0, 1, 2, 3, 4),
    "dbim": (0, 1, 2, 3, 4, 5),
    "group_norm": (0,),
    "group_norm_silu": (0, 1),
    "residual_add": (0, 1),
    "layer_norm_linear": (0,),
    "layer_norm_geglu": (0,),
    "linear_add": (0, 3, 4),
}
# By op and argument, the axis that counts a concept's tokens: few, whatever the concept
_TOKENS = {("cross_attention", 3): 1, ("residual_apply", 2): 2, ("residual_apply", 4): 1}


@dataclass(frozen=True, slots=True)
class Call:
    """A call with tensors on the meta device, and how often a model makes it."""

    op: str
    arguments: tuple[Any, ...]
    times: int = 1

    @property
    def key(self) -> Key:
        return key_of(self.op, self.arguments)

    @property
    def rows(self) -> int:
        return len(self.arguments[0])

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.arguments if isinstance(x, Tensor))

    def to_json(self) -> dict[str, Any]:
        def of(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return {"shape": list(x.shape), "stride": list(x.stride()), "dtype": str(x.dtype).removeprefix("torch.")}

        return {"op": self.op, "arguments": [of(x) for x in self.arguments]}

    @staticmethod
    def from_json(found: dict[str, Any]) -> Call:
        def of(x: Any) -> Any:
            if not isinstance(x, dict):
                return x
            return torch.empty_strided(x["shape"], x["stride"], dtype=getattr(torch, x["dtype"]), device="meta")

        return Call(found["op"], tuple(of(x) for x in found["arguments"]))


def key_of(op: str, arguments: tuple[Any, ...]) -> Key:
    """Dtypes, shapes and strides of tensors, but for their rows, and all else as it is."""
    rows = ROW_ARGUMENTS[op]
    parts: list[Any] = [op]
    for i, x in enumerate(arguments):
        if not isinstance(x, Tensor):
            parts.append(x)
            continue
        first = 1 if i in rows else 0
        shape, stride = x.shape[first:], x.stride()[first:]
        if (op, i) in _TOKENS:
            axis = _TOKENS[op, i] - first
            shape, stride = shape[:axis] + shape[axis + 1 :], ()
        parts.append((str(x.dtype).removeprefix("torch."), tuple(shape), tuple(stride)))
    return tuple(parts)


def words_of(key: Key) -> str:
    """A key as a line of a table: the op, and its first tensor's dtype and shape, and the others' shapes."""
    op, *parts = key
    tensors = [part for part in parts if isinstance(part, tuple)]
    shapes = " ".join("x".join(map(str, shape)) for _, shape, _ in tensors if shape)
    return f"{op} {tensors[0][0]} {shapes}"


def recording(found: dict[tuple[Key, int], Call]) -> Ops:
    """A record of operations that compute nothing, on the meta device, and keep how they were called in ``found``."""

    def recorded(op: str, shape: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            one = Call(op, arguments)
            place = one.key, one.rows
            found[place] = replace(found[place], times=found[place].times + 1) if place in found else one
            return shape(*arguments)

        return call

    others: dict[str, Any] = {op: recorded(op, shape) for op, shape in _SHAPES.items()}
    return Ops("recording", conv3x3=_convolved, **others)


def _convolved(x: Tensor, weight: Tensor, _bias: Tensor | None) -> Tensor:
    """What cuDNN gives for weights in channels-last order."""
    shape = (len(x), len(weight), *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _with_columns(q: Tensor, _k: Tensor, _v: Tensor, tokens: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(*q.shape[:2], tokens.shape[1] * n_heads)


def _like_first(x: Tensor, *_rest: Any) -> Tensor:
    return torch.empty_like(x)


_SHAPES: dict[str, Callable[..., Any]] = {
    "attention": lambda q, *_: q.new_empty(q.shape),
    "cross_attention": _with_columns,
    "residual_apply": _like_first,
    "dbim": _like_first,
    "group_norm": _like_first,
    "group_norm_silu": _like_first,
    "residual_add": _like_first,
    "layer_norm_linear": lambda x, _weight, _bias, _eps, weight: x.new_empty(*x.shape[:-1], len(weight)),
    "layer_norm_geglu": lambda x, _w, _b, _eps, weight, _bias: x.new_empty(*x.shape[:-1], len(weight) // 2),
    "linear_add": lambda _x, _weight, _bias, residual, *_: torch.empty_like(residual),
}


def reference(op: str) -> Callable[..., Any]:
    """torch's own implementation."""
    return getattr(TORCH, op)


def outputs(results: Any) -> Iterator[Tensor]:
    """The tensors that an operation returned."""
    yield from (results,) if isinstance(results, Tensor) else results
