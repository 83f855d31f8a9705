"""One map, two values: ``O = P V`` and ``O' = P (V + sum_t e_t r_t^T)`` (Infusion, arXiv:2404.14007, eq. 6 and 7).

The literal form, for a caller that wants the base and the customised output side by side, before the output projection.
The map is formed once and stays on the chip.

The engine has no such caller, since ``to_out`` is linear: a customised row is the base's output, projected
once, plus map columns times projected residuals (``cross_attention`` and ``residual_apply``). That takes a product of
inner size heads times tokens where this form takes ``P V`` and the output projection a second time: at SD v1.5's 64x64
layers a fortieth of the arithmetic, and one output instead of two to write and read. The tests count it, and hold the
engine's way against this form.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (triton declares constexpr arguments as objects; launches pass plain numbers)

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .cross_attention import check_layout, cross_attention, cross_attention_ref, map_tile, tile
from .jit import cdiv, jit

if TYPE_CHECKING:
    import triton.language as tl

torch.library.define(
    "twinstream::cross_attention_pair",
    "(Tensor q, Tensor k, Tensor v, Tensor tokens, Tensor residuals, int n_heads) -> (Tensor, Tensor)",
)


def cross_attention_pair_ref(
    q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, residuals: Tensor, n_heads: int
) -> tuple[Tensor, Tensor]:
    """Both outputs, the second with the augmented values written out.

    Args:
        q: (B, N, H*D) queries, heads packed along the last axis.
        k, v: (B, S, H*D) keys and values, dtype of ``q``.
        tokens: (B, T) int64, where the residuals act, each in 0..S-1; residuals on one token add up.
        residuals: (B, T, H*D) residual values.
        n_heads: H.

    Returns:
        ``O`` and ``O'``, each (B, N, H*D).
    """
    augmented = v.scatter_add(1, tokens[:, :, None].expand_as(residuals), residuals)
    no_columns = tokens[:, :0]
    out, _ = cross_attention_ref(q, k, v, no_columns, n_heads)
    out_residual, _ = cross_attention_ref(q, k, augmented, no_columns, n_heads)
    return out, out_residual


@jit
def _cross_attention_pair_fwd_kernel(
    q_ptr, k_ptr, v_ptr, tokens_ptr, residuals_ptr, out_ptr, out_residual_ptr, N, S, C, T, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid_h, pid_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_s = tl.arange(0, BLOCK_S)
    mask_n = offs_n < N
    at_q, at_k = pid_b * N * C + pid_h * D, pid_b * S * C + pid_h * D
    p = map_tile(q_ptr + at_q, k_ptr + at_k, offs_n, N, S, C, scale, D, BLOCK_N, BLOCK_S, CHUNK, PRECISION)
    p = p.to(v_ptr.dtype.element_ty)
    for first in range(0, D, CHUNK):
        offs_d = first + tl.arange(0, CHUNK)
        mask_d = offs_d < D
        mask_v = (offs_s < S)[:, None] & mask_d[None, :]
        v = tl.load(v_ptr + at_k + offs_s[:, None] * C + offs_d[None, :], mask=mask_v, other=0.0)
        at = at_q + offs_n[:, None] * C + offs_d[None, :]
        mask = mask_n[:, None] & mask_d[None, :]
        out = tl.dot(p, v, input_precision=PRECISION)
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)
        for t in range(T):
            token = tl.load(tokens_ptr + pid_b * T + t)
            r = tl.load(residuals_ptr + (pid_b * T + t) * C + pid_h * D + offs_d, mask=mask_d, other=0.0)
            v = tl.where(offs_s[:, None] == token, v + r[None, :], v)
        out = tl.dot(p, v, input_precision=PRECISION)
        tl.store(out_residual_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


def cross_attention_pair_triton(
    q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, residuals: Tensor, n_heads: int
) -> tuple[Tensor, Tensor]:
    """Launch the kernel on contiguous tensors."""
    check_layout(n_heads, tokens, q=q, k=k, v=v, residuals=residuals)
    (B, N, C), S, T = q.shape, k.shape[1], tokens.shape[1]
    out, out_residual = torch.empty_like(q), torch.empty_like(q)
    if not out.numel():
        return out, out_residual
    constants = tile(q, k, n_heads)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        _cross_attention_pair_fwd_kernel[(cdiv(N, constants["BLOCK_N"]), n_heads, B)](
            q, k, v, tokens, residuals, out, out_residual, N, S, C, T, (C // n_heads) ** -0.5, **constants
        )  # fmt: skip
    return out, out_residual


torch.library.impl("twinstream::cross_attention_pair", "cuda", cross_attention_pair_triton)
torch.library.impl("twinstream::cross_attention_pair", "cpu", cross_attention_pair_ref)


@torch.library.register_fake("twinstream::cross_attention_pair")
def _cross_attention_pair_fake(
    q: Tensor,
    k: Tensor,  # noqa: ARG001
    v: Tensor,  # noqa: ARG001
    tokens: Tensor,  # noqa: ARG001
    residuals: Tensor,  # noqa: ARG001
    n_heads: int,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(q)


class _CrossAttentionPair(torch.autograd.Function):
    """The gradient with respect to the residuals, ``dr_t = sum_n p_nt dO'_n``; all else is frozen."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, residuals: Tensor, n_heads: int) -> Any:
        ctx.save_for_backward(q, k, v, tokens)
        ctx.n_heads = n_heads
        outputs = torch.ops.twinstream.cross_attention_pair(q, k, v, tokens, residuals, n_heads)
        ctx.mark_non_differentiable(outputs[0])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, tokens = ctx.saved_tensors
        _, columns = cross_attention(q, k, v, tokens, ctx.n_heads)
        columns = columns.unflatten(-1, (-1, ctx.n_heads))  # (B, N, T, H)
        grad = grads[1].unflatten(-1, (ctx.n_heads, -1))  # (B, N, H, D)
        return None, None, None, None, torch.einsum("bnth,bnhd->bthd", columns, grad).flatten(2), None


def cross_attention_pair(
    q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, residuals: Tensor, n_heads: int
) -> tuple[Tensor, Tensor]:
    """Through the dispatcher: Triton on CUDA tensors, the reference on CPU tensors. Differentiable in ``residuals``."""
    if torch.is_grad_enabled() and residuals.requires_grad:
        return _CrossAttentionPair.apply(q, k, v, tokens, residuals, n_heads)
    return torch.ops.twinstream.cross_attention_pair(q, k, v, tokens, residuals, n_heads)
