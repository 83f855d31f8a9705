"""LayerNorm and the projection behind it: ``y = LN(x) W^T`` (Ba et al. 2016, arXiv:1607.06450).

With mean m and inverse deviation r of a row, weight g and bias h of the norm, and ``W' = W g``, column by column,

    y = r (x W'^T - m sum(W')) + W h

where the sum is over a row of W'. So the product is one of the rows as they are, and all else follows it. W' is rounded
to half precision, where eager code rounds ``LN(x)``; its sum is of the rounded values, so that the mean cancels exactly
whatever the rounding. What remains of it is float32's error in a sum that is larger by ``m r``: 1.3e-5 of the largest
result where ``m r`` is 30 and 1.6e-4 where it is 300, beside the 4e-4 of eager float16 at either (320 channels,
random numbers). W' is made once for a weight, and lives as long.

In float32, where eager code errs by 1.6e-6 at 30, that is too much: there torch normalises the rows.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (triton declares constexpr arguments as objects; launches pass plain numbers)

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .jit import cdiv, jit, next_power_of_2
from .product import Product, check_products, multiply
from .product_tiles import HALVES

if TYPE_CHECKING:
    import triton.language as tl

_BLOCK_ROWS = 8

torch.library.define(
    "twinstream::layer_norm_linear",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight, *, bool tma=True) -> Tensor",
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


def row_stats(x: Tensor, eps: float) -> Tensor:
    """Mean and inverse deviation (M, 2) float32 of the rows of a contiguous ``x`` (M, C)."""
    M, K = x.shape
    stats = x.new_empty(M, 2, dtype=torch.float32)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _layer_norm_stats_kernel[(cdiv(M, _BLOCK_ROWS),)](
            x, stats, M, K, eps, BLOCK_M=_BLOCK_ROWS, BLOCK_K=next_power_of_2(K)
        )
    return stats


def fold(weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """A norm's weight and bias as part of the projection behind it.

    W' is scaled by a power of two, so that small weights of a norm cost float16 no bits.

    Returns:
        ``W'`` (N, C), dtype of ``weight``; and float32 (2 N + 1,): the sum over each row of W', what is added to each
        column of the result, and what W' was not scaled by.
    """
    exact = weight.float() * norm_weight.float()
    scale = torch.exp2(-exact.abs().amax().clamp_min(1e-30).log2().floor())
    folded = (exact * scale).to(weight.dtype)
    shift = (weight.float() * norm_bias.float()).sum(dim=1)
    if bias is not None:
        shift += bias.float()
    return folded, torch.cat([folded.sum(dim=1, dtype=torch.float32), shift, scale.reciprocal().view(1)])


class FoldedWeights:
    """What was folded of weights, as long as these live; again after a change, into the same memory.

    A CUDA graph goes on reading that memory, so what is there once stays; a fold holds the norm it is of.
    """

    def __init__(self) -> None:
        self._kept: Any = WeakTensorKeyDictionary()  # -> by the other tensors' ids: these, versions, W' and sums
        self._lock = threading.Lock()

    def __call__(self, weight: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
        """``fold`` of these; not while a graph is captured, unless it was there before."""
        versions = tuple(0 if x is None or x.is_inference() else x._version for x in (weight, *others))
        key = tuple(map(id, others))
        found = self._kept.get(weight, {}).get(key)
        if found is None or found[1] != versions:
            with self._lock:
                by_others = self._kept.setdefault(weight, {})
                found = by_others.get(key)
                if found is None or found[1] != versions:
                    found = by_others[key] = (others, versions, self._fold(weight, others, found))
        return found[2]

    @torch.inference_mode(False)  # which would make what nobody may write outside of it
    @torch.no_grad()
    def _fold(self, weight: Tensor, others: Any, before: Any) -> tuple[Tensor, Tensor]:
        made = fold(weight, *others)
        if before is not None:
            made = tuple(old.copy_(new) for old, new in zip(before[2], made, strict=True))
        if weight.is_cuda:
            torch.cuda.current_stream(weight.device).synchronize()  # other streams read it without waiting
        return made


_folded = FoldedWeights()


def normed_product(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor | None, gated: bool
) -> Product:
    """The product of a contiguous, normalised ``x`` with a weight, in the form that its dtype allows."""
    rows = x.view(-1, x.shape[-1])
    if x.dtype not in HALVES:
        rows = F.layer_norm(rows, rows.shape[-1:], norm_weight, norm_bias, eps)
        return Product(rows, weight, bias=bias, gated=gated)
    folded, sums = _folded(weight, norm_weight, norm_bias, bias)
    return Product(rows, folded, stats=row_stats(rows, eps), sums=sums, gated=gated)


def layer_norm_linear_triton(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, *, tma: bool = True
) -> Tensor:
    """Launch the kernels on contiguous tensors."""
    check_products(x=x, weight=weight)
    y = x.new_empty(*x.shape[:-1], len(weight))
    if y.numel():
        product = normed_product(x, norm_weight, norm_bias, eps, weight, None, gated=False)
        multiply(product, y, tma)
    return y


torch.library.impl("twinstream::layer_norm_linear", "cuda", layer_norm_linear_triton)


@torch.library.impl("twinstream::layer_norm_linear", "cpu")
def _layer_norm_linear_cpu(*arguments: Any, tma: bool = True) -> Tensor:  # noqa: ARG001
    return layer_norm_linear_ref(*arguments)


@torch.library.register_fake("twinstream::layer_norm_linear")
def _layer_norm_linear_fake(
    x: Tensor,
    norm_weight: Tensor,  # noqa: ARG001
    norm_bias: Tensor,  # noqa: ARG001
    eps: float,  # noqa: ARG001
    weight: Tensor,
    *,
    tma: bool = True,  # noqa: ARG001
) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def layer_norm_linear(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, *, tma: bool = True
) -> Tensor:
    """Through the dispatcher: Triton on CUDA tensors, the reference on CPU tensors. No gradient.

    Without ``tma``, tiles come through pointers on Hopper cards too.
    """
    return torch.ops.twinstream.layer_norm_linear(x, norm_weight, norm_bias, eps, weight, tma=tma)
