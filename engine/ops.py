"""The operations whose implementation depends on the backend, as one record chosen at load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .kernels.attention import attention_ref
from .kernels.geglu import geglu, geglu_ref
from .kernels.group_norm_silu import group_norm_silu, group_norm_silu_ref


@dataclass(frozen=True, slots=True)
class Ops:
    """Functions with the signatures of the eager references in ``kernels/``."""

    name: str
    attention: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    geglu: Callable[[Tensor], Tensor]
    group_norm_silu: Callable[[Tensor, Tensor, Tensor, int, float], Tensor]


TORCH = Ops("torch", attention_ref, geglu_ref, group_norm_silu_ref)
TRITON = Ops("triton", attention_ref, geglu, group_norm_silu)  # attention stays torch's until a kernel of ours wins
