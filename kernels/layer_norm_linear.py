"""LayerNorm and the projection behind it: ``y = LN(x) W^T`` (Ba et al. 2016, arXiv:1607.06450).

A first kernel takes each row's mean and inverse deviation; the product's kernel normalises its tiles of ``x`` as it
loads them, so the normalised rows never are in memory.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (triton declares constexpr arguments as objects; launches pass plain numbers)

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .jit import cdiv, jit, next_power_of_2

if TYPE_CHECKING:
    import triton.language as tl

_BLOCK_ROWS = 8
_TILE = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}

torch.library.define(
    "twinstream::layer_norm_linear",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight) -> Tensor",
)


def layer_norm_linear_ref(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor) -> Tensor:
    """Eager LayerNorm and projection.

    Args:
        x: (..., C).
        norm_weight, norm_bias: (C,).
        eps: added to the variance.
        weight: (C_out, C).

    Returns:
        (..., C_out), dtype of ``x``.
    """
    return F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), weight)


@jit
def _layer_norm_stats_kernel(x_ptr, stats_ptr, M, K, eps, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * K + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / K
    distance = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(distance * distance, axis=1) / K + eps)
    tl.store(stats_ptr + 2 * offs_m, mean, mask=offs_m < M)
    tl.store(stats_ptr + 2 * offs_m + 1, rstd, mask=offs_m < M)


@jit
def normalised_tile(x_ptr, norm_weight_ptr, norm_bias_ptr, offs_m, offs_k, mean, rstd, M, K):
    """``LN(x)`` (BLOCK_M, BLOCK_K) in the dtype of ``x``, zeros beyond its channels."""
    mask_k = offs_k < K
    x = tl.load(x_ptr + offs_m[:, None] * K + offs_k[None, :], mask=(offs_m < M)[:, None] & mask_k[None, :], other=0.0)
    gamma = tl.load(norm_weight_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    beta = tl.load(norm_bias_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    y = (x.to(tl.float32) - mean[:, None]) * rstd[:, None] * gamma[None, :] + beta[None, :]
    return y.to(x_ptr.dtype.element_ty)


@jit
def weight_tile(weight_ptr, offs_n, offs_k, N, K):
    """Rows ``offs_n`` of a weight (N, K), transposed: (BLOCK_K, BLOCK_N)."""
    mask = (offs_k < K)[:, None] & (offs_n < N)[None, :]
    return tl.load(weight_ptr + offs_n[None, :] * K + offs_k[:, None], mask=mask, other=0.0)


@jit
def _layer_norm_linear_fwd_kernel(
    x_ptr, stats_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, y_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mean = tl.load(stats_ptr + 2 * offs_m, mask=mask_m, other=0.0)
    rstd = tl.load(stats_ptr + 2 * offs_m + 1, mask=mask_m, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        x = normalised_tile(x_ptr, norm_weight_ptr, norm_bias_ptr, offs_m, offs_k, mean, rstd, M, K)
        acc = tl.dot(x, weight_tile(weight_ptr, offs_n, offs_k, N, K), acc, input_precision=PRECISION)
    mask = mask_m[:, None] & (offs_n < N)[None, :]
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


def precision(dtype: torch.dtype) -> str:
    """How products are formed; nothing but float32 has a choice."""
    return "ieee" if dtype == torch.float32 else "tf32"


def check_products(**inputs: Tensor) -> None:
    """Refuse tensors the kernels of products cannot walk."""
    for name, x in inputs.items():
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got {tuple(x.shape)}, strides {x.stride()}")


def row_stats(x: Tensor, eps: float) -> Tensor:
    """Mean and inverse deviation (M, 2) float32 of the M rows of a contiguous ``x`` (..., C)."""
    K = x.shape[-1]
    M = x.numel() // K
    stats = x.new_empty(M, 2, dtype=torch.float32)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _layer_norm_stats_kernel[(cdiv(M, _BLOCK_ROWS),)](
            x, stats, M, K, eps, BLOCK_M=_BLOCK_ROWS, BLOCK_K=next_power_of_2(K)
        )
    return stats


def layer_norm_linear_triton(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor) -> Tensor:
    """Launch the kernels on contiguous tensors."""
    check_products(x=x, weight=weight)
    N, K = weight.shape
    y = x.new_empty(*x.shape[:-1], N)
    if not y.numel():
        return y
    M, stats = x.numel() // K, row_stats(x, eps)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _layer_norm_linear_fwd_kernel[(cdiv(N, _TILE["BLOCK_N"]), cdiv(M, _TILE["BLOCK_M"]))](
            x, stats, norm_weight, norm_bias, weight, y, M, N, K, PRECISION=precision(x.dtype), **_TILE
        )  # fmt: skip
    return y


torch.library.impl("twinstream::layer_norm_linear", "cuda", layer_norm_linear_triton)
torch.library.impl("twinstream::layer_norm_linear", "cpu", layer_norm_linear_ref)


@torch.library.register_fake("twinstream::layer_norm_linear")
def _layer_norm_linear_fake(
    x: Tensor,
    norm_weight: Tensor,  # noqa: ARG001
    norm_bias: Tensor,  # noqa: ARG001
    eps: float,  # noqa: ARG001
    weight: Tensor,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def layer_norm_linear(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor) -> Tensor:
    """Through the dispatcher: Triton on CUDA tensors, the reference on CPU tensors. No gradient."""
    return torch.ops.twinstream.layer_norm_linear(x, norm_weight, norm_bias, eps, weight)
