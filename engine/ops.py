"""The operations whose implementation depends on the backend, as one record chosen at load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .kernels.attention import attention_ref
from .kernels.cross_attention import cross_attention, cross_attention_sdpa
from .kernels.dbim import dbim, dbim_ref
from .kernels.geglu import geglu, geglu_ref
from .kernels.group_norm_silu import group_norm_ref, group_norm_silu, group_norm_silu_ref
from .kernels.residual_apply import residual_apply, residual_apply_ref


@dataclass(frozen=True, slots=True)
class Ops:
    """Functions with the signatures of the eager references in ``kernels/``."""

    name: str
    attention: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    cross_attention: Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
    residual_apply: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    dbim: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, bool], Tensor]
    geglu: Callable[[Tensor], Tensor]
    group_norm: Callable[[Tensor, Tensor, Tensor, int, float], Tensor]
    group_norm_silu: Callable[[Tensor, Tensor, Tensor, int, float], Tensor]
    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]


def layer_norm_ref(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis (Ba et al. 2016, arXiv:1607.06450); ``weight`` and ``bias`` have its size."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


TORCH = Ops(
    name="torch",
    attention=attention_ref,
    cross_attention=cross_attention_sdpa,
    residual_apply=residual_apply_ref,
    dbim=dbim_ref,
    geglu=geglu_ref,
    group_norm=group_norm_ref,
    group_norm_silu=group_norm_silu_ref,
    layer_norm=layer_norm_ref,
)
TRITON = Ops(
    name="triton",
    attention=attention_ref,  # torch's until a kernel of ours wins
    cross_attention=cross_attention,
    residual_apply=residual_apply,
    dbim=dbim,
    geglu=geglu,
    group_norm=group_norm_ref,  # torch's, as is layer_norm
    group_norm_silu=group_norm_silu,
    layer_norm=layer_norm_ref,
)
