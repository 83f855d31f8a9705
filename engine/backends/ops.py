"""The operations whose implementation depends on the backend, as one record chosen at load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

from torch import Tensor

from ..kernels.attention import attention, attention_ref
from ..kernels.conv3x3 import conv3x3_ref
from ..kernels.cross_attention import cross_attention, cross_attention_sdpa
from ..kernels.dbim import dbim, dbim_ref
from ..kernels.group_norm_silu import group_norm, group_norm_ref, group_norm_silu, group_norm_silu_ref
from ..kernels.layer_norm_geglu import layer_norm_geglu, layer_norm_geglu_ref
from ..kernels.layer_norm_linear import layer_norm_linear, layer_norm_linear_ref
from ..kernels.linear_add import linear_add, linear_add_ref
from ..kernels.residual_add import residual_add, residual_add_ref
from ..kernels.residual_apply import residual_apply, residual_apply_ref
from .graphs import Graphs
from .small_blocks import SmallBlocks


@dataclass(frozen=True, slots=True)
class Ops:
    """Functions with the signatures of the eager references in ``kernels/``; ``residual_add`` may use up its ``x``.

    ``small`` runs whole blocks of small models, where a backend has something for it; else they are run op by op.
    """

    name: str
    attention: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    cross_attention: Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
    residual_apply: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    dbim: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, bool], Tensor]
    group_norm: Callable[[Tensor, Tensor, Tensor, int, float], Tensor]
    group_norm_silu: Callable[[Tensor, Tensor | None, Tensor, Tensor, int, float], Tensor]
    conv3x3: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    residual_add: Callable[[Tensor, Tensor, Tensor], Tensor]
    layer_norm_linear: Callable[[Tensor, Tensor, Tensor, float, Tensor], Tensor]
    layer_norm_geglu: Callable[[Tensor, Tensor, Tensor, float, Tensor, Tensor], Tensor]
    linear_add: Callable[..., Tensor]
    small: SmallBlocks | None = None

    def small_for(self, positions: int, *channels: int) -> SmallBlocks | None:
        """``small``, where a picture has so few positions, and a block so few channels; else None."""
        return self.small if self.small is not None and self.small.fit(positions, *channels) else None


TORCH = Ops(
    name="torch",
    attention=attention_ref,
    cross_attention=cross_attention_sdpa,
    residual_apply=residual_apply_ref,
    dbim=dbim_ref,
    group_norm=group_norm_ref,
    group_norm_silu=group_norm_silu_ref,
    conv3x3=conv3x3_ref,
    residual_add=residual_add_ref,
    layer_norm_linear=layer_norm_linear_ref,
    layer_norm_geglu=layer_norm_geglu_ref,
    linear_add=linear_add_ref,
)
TRITON = Ops(
    name="triton",
    attention=attention,
    cross_attention=cross_attention,
    residual_apply=residual_apply,
    dbim=dbim,
    group_norm=group_norm,
    group_norm_silu=group_norm_silu,
    conv3x3=conv3x3_ref,
    residual_add=residual_add,
    layer_norm_linear=layer_norm_linear,
    layer_norm_geglu=layer_norm_geglu,
    linear_add=linear_add,
)

CALIBRATED = "calibrated"
_PRODUCTS = ("layer_norm_linear", "layer_norm_geglu", "linear_add")
_NATIVE_PRODUCT = ", its product by oneDNN or MKL"


def serving(ops: Ops) -> dict[str, str]:
    """What runs each op, in words."""
    found = {}
    for op in fields(ops):
        if op.name in ("name", "small"):
            continue
        what = describe(getattr(ops, op.name))
        found[op.name] = f"{ops.name}: {what}" + _NATIVE_PRODUCT * (ops.name == "native" and op.name in _PRODUCTS)
    if ops.small is not None:
        found["small blocks"] = f"{ops.name}: {ops.small.limits}, in one call each"
    return found


def told(ops: Ops, graphs: Graphs | None) -> dict[str, object]:
    """What a result's settings say beside the backend's name, where that does not say it all."""
    calibrated: dict[str, object] = {"ops": serving(ops)} if ops.name == CALIBRATED else {}
    return calibrated | ({} if graphs is None else {"graphs": graphs.failed or "replayed"})


def describe(function: Callable[..., object]) -> str:
    """A function by its module and name; what is bound to arguments, as what it is made of; what tells itself, so."""
    while isinstance(function, partial):
        function = function.func
    if not hasattr(function, "__name__"):
        return str(function)
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
