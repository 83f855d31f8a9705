"""What begins a feed-forward: ``y = v * gelu(g)`` with ``[v | g] = LN(x) W^T + b`` (Shazeer 2020, arXiv:2002.05202).

The kernel forms a tile of values and the same tile of gates, so the projection, twice as wide as ``y`` and the largest
activation of a transformer block, never is in memory.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (triton declares constexpr arguments as objects; launches pass plain numbers)

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .geglu import geglu, geglu_ref
from .jit import cdiv, jit
from .layer_norm_linear import check_products, normalised_tile, precision, row_stats, weight_tile

if TYPE_CHECKING:
    import triton.language as tl

_TILE = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}

torch.library.define(
    "twinstream::layer_norm_geglu",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight, Tensor bias) -> Tensor",
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


@jit
def _layer_norm_geglu_fwd_kernel(
    x_ptr, stats_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, bias_ptr, y_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    mean = tl.load(stats_ptr + 2 * offs_m, mask=mask_m, other=0.0)
    rstd = tl.load(stats_ptr + 2 * offs_m + 1, mask=mask_m, other=0.0)
    value = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gates_ptr = weight_ptr + tl.cast(N, tl.int64) * K
    for first in range(0, K, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        x = normalised_tile(x_ptr, norm_weight_ptr, norm_bias_ptr, offs_m, offs_k, mean, rstd, M, K)
        value = tl.dot(x, weight_tile(weight_ptr, offs_n, offs_k, N, K), value, input_precision=PRECISION)
        gate = tl.dot(x, weight_tile(gates_ptr, offs_n, offs_k, N, K), gate, input_precision=PRECISION)
    value += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    gate += tl.load(bias_ptr + N + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y = value * 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))  # 1/sqrt(2)
    at = offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def layer_norm_geglu_triton(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor
) -> Tensor:
    """Launch the kernels on contiguous tensors."""
    check_products(x=x, weight=weight)
    N, K = len(weight) // 2, weight.shape[1]
    y = x.new_empty(*x.shape[:-1], N)
    if not y.numel():
        return y
    M, stats = x.numel() // K, row_stats(x, eps)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _layer_norm_geglu_fwd_kernel[(cdiv(N, _TILE["BLOCK_N"]), cdiv(M, _TILE["BLOCK_M"]))](
            x, stats, norm_weight, norm_bias, weight, bias, y, M, N, K, PRECISION=precision(x.dtype), **_TILE
        )  # fmt: skip
    return y


torch.library.impl("twinstream::layer_norm_geglu", "cuda", layer_norm_geglu_triton)
torch.library.impl("twinstream::layer_norm_geglu", "cpu", layer_norm_geglu_ref)


@torch.library.register_fake("twinstream::layer_norm_geglu")
def _layer_norm_geglu_fake(
    x: Tensor,
    norm_weight: Tensor,  # noqa: ARG001
    norm_bias: Tensor,  # noqa: ARG001
    eps: float,  # noqa: ARG001
    weight: Tensor,
    bias: Tensor,  # noqa: ARG001
) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight) // 2)


def layer_norm_geglu(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor
) -> Tensor:
    """Through the dispatcher: Triton on CUDA tensors, the reference on CPU tensors. No gradient."""
    return torch.ops.twinstream.layer_norm_geglu(x, norm_weight, norm_bias, eps, weight, bias)


def layer_norm_geglu_unfused(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor
) -> Tensor:
    """torch's LayerNorm and product, and our GEGLU."""
    return geglu(F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), weight, bias))
