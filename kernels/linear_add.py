"""A projection onto the residual stream: ``y = r + x W^T + b``, or ``y = r + x W^T + z V^T + b`` for two inputs.

The second form is a feed-forward's output projection composed with the transformer's: with gated hidden rows ``g`` and
the stream ``t`` before them, ``r + W_po (t + W_2 g + b_2) + b_po = r + [W_po W_2 | W_po] [g ; t] + (W_po b_2 + b_po)``.
Bias and residual are added to float32 sums, which are rounded once.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (triton declares constexpr arguments as objects; launches pass plain numbers)

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .jit import cdiv, jit
from .layer_norm_linear import check_products, precision, weight_tile

if TYPE_CHECKING:
    import triton.language as tl

_TILE = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}

torch.library.define(
    "twinstream::linear_add",
    "(Tensor x, Tensor weight, Tensor bias, Tensor residual, Tensor? z, Tensor? z_weight) -> Tensor",
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


@jit
def _product(acc, x_ptr, weight_ptr, offs_m, offs_n, M, N, K, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """``acc`` plus the tile's rows of ``x`` (M, K) times ``weight`` (N, K) transposed."""
    for first in range(0, K, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * K + offs_k[None, :], mask=mask, other=0.0)
        acc = tl.dot(x, weight_tile(weight_ptr, offs_n, offs_k, N, K), acc, input_precision=PRECISION)
    return acc


@jit
def _linear_add_fwd_kernel(
    x_ptr, weight_ptr, z_ptr, z_weight_ptr, bias_ptr, residual_ptr, y_ptr, M, N, K, K_z,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = _product(acc, x_ptr, weight_ptr, offs_m, offs_n, M, N, K, BLOCK_K, PRECISION)
    acc = _product(acc, z_ptr, z_weight_ptr, offs_m, offs_n, M, N, K_z, BLOCK_K, PRECISION)
    at = offs_m[:, None] * N + offs_n[None, :]
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    acc += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=mask)


def linear_add_triton(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, z: Tensor | None = None, z_weight: Tensor | None = None
) -> Tensor:
    """Launch the kernel on contiguous tensors."""
    if (z is None) != (z_weight is None):
        raise ValueError(f"z and z_weight must be given together, got {z is not None} and {z_weight is not None}")
    second = (x.new_empty(0), x.new_empty(0)) if z is None or z_weight is None else (z, z_weight)
    check_products(x=x, weight=weight, residual=residual, z=second[0], z_weight=second[1])
    N, K = weight.shape
    M, K_z = residual.numel() // N, second[1].shape[-1]
    y = torch.empty_like(residual)
    if y.numel():
        with torch.cuda.device_of(x):  # Triton launches on the current device
            _linear_add_fwd_kernel[(cdiv(N, _TILE["BLOCK_N"]), cdiv(M, _TILE["BLOCK_M"]))](
                x, weight, *second, bias, residual, y, M, N, K, K_z, PRECISION=precision(x.dtype), **_TILE
            )  # fmt: skip
    return y


torch.library.impl("twinstream::linear_add", "cuda", linear_add_triton)
torch.library.impl("twinstream::linear_add", "cpu", linear_add_ref)


@torch.library.register_fake("twinstream::linear_add")
def _linear_add_fake(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, *_second: Tensor | None) -> Tensor:  # noqa: ARG001
    return torch.empty_like(residual)


def linear_add(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, z: Tensor | None = None, z_weight: Tensor | None = None
) -> Tensor:
    """Through the dispatcher: Triton on CUDA tensors, the reference on CPU tensors. No gradient."""
    return torch.ops.twinstream.linear_add(x, weight, bias, residual, z, z_weight)
