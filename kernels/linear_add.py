"""A projection onto the residual stream: ``y = r + x W^T + b``, or ``y = r + x W^T + z V^T + b`` for two inputs.

The second form is a feed-forward's output projection composed with the transformer's: with gated hidden rows ``g`` and
the stream ``t`` before them, ``r + W_po (t + W_2 g + b_2) + b_po = r + [W_po W_2 | W_po] [g ; t] + (W_po b_2 + b_po)``.
Bias and residual are added to float32 sums, which are rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .product import Product, check_products, multiply

torch.library.define(
    "twinstream::linear_add",
    "(Tensor x, Tensor weight, Tensor bias, Tensor residual, Tensor? z, Tensor? z_weight, *, bool tma=True) -> Tensor",
)


def linear_add_ref(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, z: Tensor | None = None, z_weight: Tensor | None = None
) -> Tensor:
    """Eager projection and sum.

    Args:
        x: (..., C) input.
        weight, bias: (C_out, C) and (C_out,).
        residual: (..., C_out).
        z, z_weight: a second input (..., C_z) and its weight (C_out, C_z); both or neither.

    Returns:
        (..., C_out), dtype of ``x``.
    """
    y = F.linear(x, weight, bias)
    if z is not None and z_weight is not None:
        y = y + F.linear(z, z_weight)
    return residual + y


def linear_add_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    z: Tensor | None = None,
    z_weight: Tensor | None = None,
    *,
    tma: bool = True,
) -> Tensor:
    """Launch the kernels on contiguous tensors."""
    if (z is None) != (z_weight is None):
        raise ValueError(f"z and z_weight must be given together, got {z is not None} and {z_weight is not None}")
    check_products(x=x, weight=weight, residual=residual, z=z, z_weight=z_weight)
    y = torch.empty_like(residual)
    if y.numel():
        rows, second, third = (None if one is None else one.view(-1, one.shape[-1]) for one in (x, z, residual))
        assert rows is not None
        multiply(Product(rows, weight, second, z_weight, bias, third), y, tma)
    return y


torch.library.impl("twinstream::linear_add", "cuda", linear_add_triton)


@torch.library.impl("twinstream::linear_add", "cpu")
def _linear_add_cpu(*arguments: Any, tma: bool = True) -> Tensor:  # noqa: ARG001
    return linear_add_ref(*arguments)


@torch.library.register_fake("twinstream::linear_add")
def _linear_add_fake(
    x: Tensor,  # noqa: ARG001
    weight: Tensor,  # noqa: ARG001
    bias: Tensor,  # noqa: ARG001
    residual: Tensor,
    *_second: Tensor | None,
    tma: bool = True,  # noqa: ARG001
) -> Tensor:
    return torch.empty_like(residual)


def linear_add(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    z: Tensor | None = None,
    z_weight: Tensor | None = None,
    *,
    tma: bool = True,
) -> Tensor:
    """Through the dispatcher: Triton on CUDA tensors, the reference on CPU tensors. No gradient.

    Without ``tma``, tiles come through pointers on Hopper cards too.
    """
    return torch.ops.twinstream.linear_add(x, weight, bias, residual, z, z_weight, tma=tma)
