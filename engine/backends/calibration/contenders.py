"""The implementations that there are of each operation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ...kernels.attention import MAX_HEAD_DIM, attention, launch_of
from ...kernels.cross_attention import cross_attention_ref
from ...kernels.group_norm_silu import group_norm, group_norm_silu, launches_for
from ...kernels.layer_norm_geglu import layer_norm_geglu, layer_norm_geglu_unfused
from ...kernels.layer_norm_linear import layer_norm_linear
from ...kernels.linear_add import linear_add
from ...kernels.product_tiles import HALVES, card_of, has_descriptors
from ..ops import TORCH, TRITON
from .calls import Call

TORCHS_OWN = "torch"
OURS = "triton"
POINTERS = "triton, pointers"  # products whose tiles come as on older cards, where Hopper has another way


def contenders(call: Call) -> dict[str, Callable[..., Any]]:
    """By name: "torch", which serves where nothing better is known; "triton", ours; and what else there is.

    Names that begin with "triton" are other launches of ours. For the current device.
    """
    found = {TORCHS_OWN: getattr(TORCH, call.op)}
    if call.op != "attention" or call.arguments[0].shape[-1] // call.arguments[3] <= MAX_HEAD_DIM:
        found[OURS] = getattr(TRITON, call.op)
    return found | {name: implementation(call.op, name) for name in _OTHERS.get(call.op, ()) if _is_there(name, call)}


def implementation(op: str, name: str) -> Callable[..., Any]:
    """One of them.

    Raises:
        KeyError: there is none of this name.
    """
    if name in (TORCHS_OWN, OURS):
        return getattr(TORCH if name == TORCHS_OWN else TRITON, op)
    return _OTHERS[op][name]


def _is_there(name: str, call: Call) -> bool:
    if name == _SPLIT:
        q, k, _, n_heads = call.arguments
        return q.shape[-1] // n_heads <= MAX_HEAD_DIM and launch_of(q, k, n_heads, is_split=True)[1] > 1
    if name in _LAUNCHES:
        positions = call.arguments[0].shape[2] * call.arguments[0].shape[3]
        return _LAUNCHES[name] != launches_for(positions) and positions in _EITHER
    if name == POINTERS:
        return call.arguments[0].dtype in HALVES and has_descriptors(card_of(torch.device("cuda")))
    return name != "xformers" or find_spec("xformers") is not None


def _heads(x: Tensor, n_heads: int) -> Tensor:
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, n_heads: int) -> Tensor:
    parts = (_heads(x, n_heads) for x in (q, k, v))
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(*parts, None, False)
    return out[0].transpose(1, 2).flatten(2)


def _flash(q: Tensor, k: Tensor, v: Tensor, n_heads: int) -> Tensor:
    out = torch.ops.aten._scaled_dot_product_flash_attention(*(_heads(x, n_heads) for x in (q, k, v)))
    return out[0].transpose(1, 2).flatten(2)


def _efficient(q: Tensor, k: Tensor, v: Tensor, n_heads: int) -> Tensor:
    parts = (_heads(x, n_heads) for x in (q, k, v))
    out = torch.ops.aten._scaled_dot_product_efficient_attention(*parts, None, False)
    return out[0].transpose(1, 2).flatten(2)


def _xformers(q: Tensor, k: Tensor, v: Tensor, n_heads: int) -> Tensor:
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    return memory_efficient_attention(*(x.unflatten(-1, (n_heads, -1)) for x in (q, k, v))).flatten(2)


_SPLIT = "triton, keys split"
_LAUNCHES = {"triton, one launch": 1, "triton, two launches": 2}
_EITHER = range(1024, 4097)  # positions of a GroupNorm, of which nobody can tell by reasoning which way is faster

# SDPA's implementations are called by name: choosing one by torch's context manager would choose it for all threads
_OTHERS: dict[str, dict[str, Callable[..., Any]]] = {
    "attention": {"cudnn": _cudnn, "flash": _flash, "efficient": _efficient, "xformers": _xformers}
    | {_SPLIT: partial(attention, is_split=True)},
    "group_norm": {name: partial(group_norm, launches=n) for name, n in _LAUNCHES.items()},
    "group_norm_silu": {name: partial(group_norm_silu, launches=n) for name, n in _LAUNCHES.items()},
    "cross_attention": {"explicit": cross_attention_ref},
    "layer_norm_linear": {POINTERS: partial(layer_norm_linear, tma=False)},
    "layer_norm_geglu": {POINTERS: partial(layer_norm_geglu, tma=False), "unfused": layer_norm_geglu_unfused},
    "linear_add": {POINTERS: partial(linear_add, tma=False)},
}
