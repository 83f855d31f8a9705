"""What begins a feed-forward: ``y = v * gelu(g)`` with ``[v | g] = LN(x) W^T + b`` (Shazeer 2020, arXiv:2002.05202).

The kernel forms a tile of values and the same tile of gates, so the projection, twice as wide as ``y`` and the largest
activation of a transformer block, never is in memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .geglu import geglu, geglu_ref
from .layer_norm_linear import normed_product
from .product import check_products, multiply

torch.library.define(
    "twinstream::layer_norm_geglu",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight, Tensor bias, *, bool tma=True)"
    " -> Tensor",
)


def layer_norm_geglu_ref(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor
) -> Tensor:
    """Eager LayerNorm, projection and GEGLU.

    Args:
        x: (..., C).
        norm_weight, norm_bias: (C,).
        eps: added to the variance.
        weight, bias: (2 C_out, C) and (2 C_out,); values first, then gates.

    Returns:
        (..., C_out), dtype of ``x``.
    """
    return geglu_ref(F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), weight, bias))


def layer_norm_geglu_triton(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor, *, tma: bool = True
) -> Tensor:
    """Launch the kernels on contiguous tensors."""
    check_products(x=x, weight=weight)
    y = x.new_empty(*x.shape[:-1], len(weight) // 2)
    if y.numel():
        multiply(normed_product(x, norm_weight, norm_bias, eps, weight, bias, gated=True), y, tma)
    return y


torch.library.impl("twinstream::layer_norm_geglu", "cuda", layer_norm_geglu_triton)


@torch.library.impl("twinstream::layer_norm_geglu", "cpu")
def _layer_norm_geglu_cpu(*arguments: Any, tma: bool = True) -> Tensor:  # noqa: ARG001
    return layer_norm_geglu_ref(*arguments)


@torch.library.register_fake("twinstream::layer_norm_geglu")
def _layer_norm_geglu_fake(
    x: Tensor,
    norm_weight: Tensor,  # noqa: ARG001
    norm_bias: Tensor,  # noqa: ARG001
    eps: float,  # noqa: ARG001
    weight: Tensor,
    bias: Tensor,  # noqa: ARG001
    *,
    tma: bool = True,  # noqa: ARG001
) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight) // 2)


def layer_norm_geglu(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor, *, tma: bool = True
) -> Tensor:
    """Through the dispatcher: Triton on CUDA tensors, the reference on CPU tensors. No gradient.

    Without ``tma``, tiles come through pointers on Hopper cards too.
    """
    return torch.ops.twinstream.layer_norm_geglu(x, norm_weight, norm_bias, eps, weight, bias, tma=tma)


def layer_norm_geglu_unfused(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor
) -> Tensor:
    """torch's LayerNorm and product, and our GEGLU."""
    return geglu(F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), weight, bias))
