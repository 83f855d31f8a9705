"""Rows that follow another row's attention map: ``y = x + O_F + P_F R`` (Infusion, arXiv:2404.14007, eq. 7 and 9).

``O_F`` is the followed row's attention output after its output projection, ``P_F`` the map columns of the customised
tokens, and ``R`` the residual values after the same projection: the projection is linear, so a following row needs no
queries, no softmax and no projection of its own, only this product with an inner size of heads times tokens.
"""

# pyright: reportArgumentType=false
# (triton declares constexpr arguments as objects; launches pass plain numbers)

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .jit import cdiv, jit

if TYPE_CHECKING:
    import triton.language as tl

_BLOCK_N, _BLOCK_C, _BLOCK_K = 64, 64, 16

torch.library.define(
    "twinstream::residual_apply",
    "(Tensor x, Tensor out, Tensor columns, Tensor leaders, Tensor residuals) -> Tensor",
)


def residual_apply_ref(x: Tensor, out: Tensor, columns: Tensor, leaders: Tensor, residuals: Tensor) -> Tensor:
    """Eager residual apply.

    Args:
        x: (F, N, C) the following rows.
        out: (B, N, C) attention output of the rows that own a map.
        columns: (B, N, K) their map columns, K = tokens * heads.
        leaders: (F,) int64, the row of ``out`` and ``columns`` that each row of ``x`` follows.
        residuals: (F, K, C) projected residual values.

    Returns:
        (F, N, C). Zero residuals give exactly ``x + out[leaders]``.
    """
    return torch.baddbmm(x + out[leaders], columns[leaders], residuals)


@jit
def _residual_apply_fwd_kernel(
    x_ptr, out_ptr, columns_ptr, leaders_ptr, residuals_ptr, y_ptr, N, C, K,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid_f = tl.program_id(2).to(tl.int64)
    leader = tl.load(leaders_ptr + pid_f)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_n, mask_c = offs_n < N, offs_c < C
    mask = mask_n[:, None] & mask_c[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for first in range(0, K, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        at_p = (leader * N + offs_n)[:, None] * K + offs_k[None, :]
        at_r = (pid_f * K + offs_k)[:, None] * C + offs_c[None, :]
        p = tl.load(columns_ptr + at_p, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        r = tl.load(residuals_ptr + at_r, mask=mask_k[:, None] & mask_c[None, :], other=0.0)
        acc = tl.dot(p, r, acc, input_precision=PRECISION)
    at = offs_n[:, None] * C + offs_c[None, :]
    x = tl.load(x_ptr + pid_f * N * C + at, mask=mask, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + leader * N * C + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + pid_f * N * C + at, (x + out + acc).to(y_ptr.dtype.element_ty), mask=mask)


def residual_apply_triton(x: Tensor, out: Tensor, columns: Tensor, leaders: Tensor, residuals: Tensor) -> Tensor:
    """Launch the kernel on contiguous tensors."""
    for name, given in {"x": x, "out": out, "columns": columns, "leaders": leaders, "residuals": residuals}.items():
        if not given.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got {tuple(given.shape)}, strides {given.stride()}")
    y = torch.empty_like(x)
    if not y.numel():
        return y
    n_followers, N, C = x.shape
    grid = (cdiv(N, _BLOCK_N), cdiv(C, _BLOCK_C), n_followers)
    precision = "ieee" if x.dtype == torch.float32 else "tf32"  # nothing but float32 has a choice
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _residual_apply_fwd_kernel[grid](
            x, out, columns, leaders, residuals, y, N, C, columns.shape[-1],
            BLOCK_N=_BLOCK_N, BLOCK_C=_BLOCK_C, BLOCK_K=_BLOCK_K, PRECISION=precision,
        )  # fmt: skip
    return y


torch.library.impl("twinstream::residual_apply", "cuda", residual_apply_triton)
torch.library.impl("twinstream::residual_apply", "cpu", residual_apply_ref)


@torch.library.register_fake("twinstream::residual_apply")
def _residual_apply_fake(
    x: Tensor,
    out: Tensor,  # noqa: ARG001
    columns: Tensor,  # noqa: ARG001
    leaders: Tensor,  # noqa: ARG001
    residuals: Tensor,  # noqa: ARG001
) -> Tensor:
    return torch.empty_like(x)


def residual_apply(x: Tensor, out: Tensor, columns: Tensor, leaders: Tensor, residuals: Tensor) -> Tensor:
    """Through the dispatcher: Triton on CUDA tensors, the reference on CPU tensors. No gradient."""
    return torch.ops.twinstream.residual_apply(x, out, columns, leaders, residuals)
