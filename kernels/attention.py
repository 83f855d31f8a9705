"""Multi-head attention ``softmax(Q K^T / sqrt(D)) V`` over packed heads (Vaswani et al. 2017, arXiv:1706.03762).

The kernel walks over blocks of keys with a running maximum and sum (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao
et al. 2022, arXiv:2205.14135). Head dims are split into two powers of two, so that SD v1.5's 40, 80 and 160 become
32 + 16, 64 + 16 and 128 + 32: products of 48, 80 and 160, where one power of two would make them 64, 128 and 256.
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

MAX_HEAD_DIM = 256

torch.library.define("twinstream::attention", "(Tensor q, Tensor k, Tensor v, int n_heads) -> Tensor")


def attention_ref(q: Tensor, k: Tensor, v: Tensor, n_heads: int) -> Tensor:
    """Eager attention through ``scaled_dot_product_attention``.

    Args:
        q: (B, N, H*D) queries, heads packed along the last axis.
        k, v: (B, S, H*D) keys and values, dtype of ``q``.
        n_heads: H.

    Returns:
        (B, N, H*D), dtype of ``q``.
    """
    q, k, v = (x.unflatten(-1, (n_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, N, D)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@jit
def _rows_of(ptr, offs, mask, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Channels FIRST to FIRST + WIDTH of some rows of one head, zeros beyond D."""
    offs_d = FIRST + tl.arange(0, WIDTH)
    inside = mask[:, None] & (offs_d < D)[None, :]
    return tl.load(ptr + offs[:, None] * stride + offs_d[None, :], mask=inside, other=0.0)


@jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, N, S, C, stride_q, stride_k, stride_v, scale,
    D: tl.constexpr, D_LOW: tl.constexpr, D_HIGH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pid_h, pid_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    q_ptr += pid_b * N * stride_q + pid_h * D
    k_ptr += pid_b * S * stride_k + pid_h * D
    v_ptr += pid_b * S * stride_v + pid_h * D
    q_low = _rows_of(q_ptr, offs_n, mask_n, stride_q, 0, D_LOW, D)
    acc_low = tl.zeros([BLOCK_N, D_LOW], tl.float32)
    if D_HIGH:
        q_high = _rows_of(q_ptr, offs_n, mask_n, stride_q, D_LOW, D_HIGH, D)
        acc_high = tl.zeros([BLOCK_N, D_HIGH], tl.float32)
    m_i = tl.full([BLOCK_N], -1e30, tl.float32)
    l_i = tl.zeros([BLOCK_N], tl.float32)
    scale *= 1.4426950408889634  # log2(e)
    for first in range(0, S, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        mask_s = offs_s < S
        k = _rows_of(k_ptr, offs_s, mask_s, stride_k, 0, D_LOW, D)
        logits = tl.dot(q_low, tl.trans(k), input_precision=PRECISION)
        if D_HIGH:
            k = _rows_of(k_ptr, offs_s, mask_s, stride_k, D_LOW, D_HIGH, D)
            logits = tl.dot(q_high, tl.trans(k), logits, input_precision=PRECISION)
        logits = tl.where(mask_s[None, :], logits * scale, float("-inf"))
        m_next = tl.maximum(m_i, tl.max(logits, axis=1))
        p = tl.exp2(logits - m_next[:, None])
        shrink = tl.exp2(m_i - m_next)
        l_i = l_i * shrink + tl.sum(p, axis=1)
        m_i = m_next
        p = p.to(v_ptr.dtype.element_ty)
        v = _rows_of(v_ptr, offs_s, mask_s, stride_v, 0, D_LOW, D)
        acc_low = tl.dot(p, v, acc_low * shrink[:, None], input_precision=PRECISION)
        if D_HIGH:
            v = _rows_of(v_ptr, offs_s, mask_s, stride_v, D_LOW, D_HIGH, D)
            acc_high = tl.dot(p, v, acc_high * shrink[:, None], input_precision=PRECISION)
    offs_d = tl.arange(0, D_LOW)
    out_ptr += pid_b * N * C + pid_h * D
    mask = mask_n[:, None] & (offs_d < D)[None, :]
    out = (acc_low / l_i[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_n[:, None] * C + offs_d[None, :], out, mask=mask)
    if D_HIGH:
        offs_d = D_LOW + tl.arange(0, D_HIGH)
        mask = mask_n[:, None] & (offs_d < D)[None, :]
        out = (acc_high / l_i[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offs_n[:, None] * C + offs_d[None, :], out, mask=mask)


def tile(head_dim: int, dtype: torch.dtype) -> dict[str, int | str]:
    """Constants of a launch: the head dim and its two parts, tile sizes, the precision of products, warps, stages."""
    low = max(16, 1 << (head_dim.bit_length() - 1))
    rest = max(0, head_dim - low)
    high = max(16, next_power_of_2(rest)) if rest else 0
    is_wide = head_dim > 128
    return {
        "D": head_dim,
        "D_LOW": low,
        "D_HIGH": high,
        "BLOCK_N": 128,
        "BLOCK_S": 32 if is_wide else 64,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",  # nothing but float32 has a choice
        "num_warps": 8 if head_dim > 64 else 4,
        "num_stages": 2,
    }


def attention_triton(q: Tensor, k: Tensor, v: Tensor, n_heads: int) -> Tensor:
    """Launch the kernel; rows may be apart, as the three parts of one projection are."""
    (B, N, C), S = q.shape, k.shape[1]
    if C % n_heads or C // n_heads > MAX_HEAD_DIM:
        raise ValueError(f"channels must be {n_heads} heads of at most {MAX_HEAD_DIM}, got {C}")
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.stride(2) != 1 or (len(x) > 1 and x.stride(0) != x.shape[1] * x.stride(1)):
            raise ValueError(f"{name} must be (B, N, C) with rows evenly apart, got strides {x.stride()}")
    out = q.new_empty(B, N, C)
    if not out.numel():
        return out
    constants = tile(C // n_heads, q.dtype)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        _attention_fwd_kernel[(cdiv(N, constants["BLOCK_N"]), n_heads, B)](
            q, k, v, out, N, S, C, q.stride(1), k.stride(1), v.stride(1), (C // n_heads) ** -0.5, **constants
        )  # fmt: skip
    return out


torch.library.impl("twinstream::attention", "cuda", attention_triton)
torch.library.impl("twinstream::attention", "cpu", attention_ref)


@torch.library.register_fake("twinstream::attention")
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, n_heads: int) -> Tensor:  # noqa: ARG001
    return q.new_empty(q.shape)


def attention(q: Tensor, k: Tensor, v: Tensor, n_heads: int) -> Tensor:
    """Through the dispatcher: Triton on CUDA tensors, the reference on CPU tensors. No gradient.

    Heads of more than 256 channels, of which a VAE has one, are SDPA's: no tile of ours holds them.
    """
    if q.shape[-1] // n_heads > MAX_HEAD_DIM:
        return attention_ref(q, k, v, n_heads)
    return torch.ops.twinstream.attention(q, k, v, n_heads)
