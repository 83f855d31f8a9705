"""Multi-head attention ``softmax(Q K^T / sqrt(D)) V`` over packed heads (Vaswani et al. 2017, arXiv:1706.03762).

The kernel walks over blocks of keys with a running maximum and sum (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao
et al. 2022, arXiv:2205.14135). Head dims are split into two powers of two, so that SD v1.5's 40, 80 and 160 become
32 + 16, 64 + 16 and 128 + 32: products of 48, 80 and 160, where one power of two would make them 64, 128 and 256.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
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

_ENOUGH = 128  # programs: about as many as a large card has processors
_FILLED = 256  # programs, into which those that are fewer may be split
_MOST_PARTS = 8
_COMBINED = 16  # queries that one program combines

torch.library.define(
    "twinstream::attention", "(Tensor q, Tensor k, Tensor v, int n_heads, bool is_split=False) -> Tensor"
)


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
def _rows_of(ptr, offs, mask, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """Channels FIRST to FIRST + WIDTH of some rows of one head, zeros beyond D, and where ``mask`` says if MASKED."""
    offs_d = FIRST + tl.arange(0, WIDTH)
    at = ptr + offs[:, None] * stride + offs_d[None, :]
    if MASKED:
        return tl.load(at, mask=mask[:, None] & (offs_d < D)[None, :], other=0.0)
    if D < FIRST + WIDTH:
        return tl.load(at, mask=(offs_d < D)[None, :], other=0.0)
    return tl.load(at)


@jit
def _take_block(
    q_low, q_high, acc_low, acc_high, m_i, l_i, k_ptr, v_ptr, first, end, stride_k, stride_v, scale,
    D: tl.constexpr, D_LOW: tl.constexpr, D_HIGH: tl.constexpr, BLOCK_S: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What BLOCK_S more keys make of the sums; with MASKED, those from ``end`` on are left out."""
    offs_s = first + tl.arange(0, BLOCK_S)
    mask_s = offs_s < end
    k = _rows_of(k_ptr, offs_s, mask_s, stride_k, 0, D_LOW, D, MASKED)
    logits = tl.dot(q_low, tl.trans(k), input_precision=PRECISION)
    if D_HIGH:
        k = _rows_of(k_ptr, offs_s, mask_s, stride_k, D_LOW, D_HIGH, D, MASKED)
        logits = tl.dot(q_high, tl.trans(k), logits, input_precision=PRECISION)
    if MASKED:
        logits = tl.where(mask_s[None, :], logits, float("-inf"))
    m_next = tl.maximum(m_i, tl.max(logits, axis=1))
    p = tl.exp2(logits * scale - (m_next * scale)[:, None])  # one instruction before the exponential
    shrink = tl.exp2((m_i - m_next) * scale)
    l_next = l_i * shrink + tl.sum(p, axis=1)
    p = p.to(v_ptr.dtype.element_ty)
    v = _rows_of(v_ptr, offs_s, mask_s, stride_v, 0, D_LOW, D, MASKED)
    acc_low = tl.dot(p, v, acc_low * shrink[:, None], input_precision=PRECISION)
    if D_HIGH:
        v = _rows_of(v_ptr, offs_s, mask_s, stride_v, D_LOW, D_HIGH, D, MASKED)
        acc_high = tl.dot(p, v, acc_high * shrink[:, None], input_precision=PRECISION)
    return acc_low, acc_high, m_next, l_next


@jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, max_ptr, sum_ptr, N, S, C, stride_q, stride_k, stride_v, scale, part,
    D: tl.constexpr, D_LOW: tl.constexpr, D_HIGH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    PARTS: tl.constexpr, HAS_REST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid_h, pid_b = tl.program_id(1), (tl.program_id(2) // PARTS).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    q_ptr += pid_b * N * stride_q + pid_h * D
    k_ptr += pid_b * S * stride_k + pid_h * D
    v_ptr += pid_b * S * stride_v + pid_h * D
    begin, end = 0, S
    if PARTS > 1:
        begin = (tl.program_id(2) % PARTS) * part
        end = tl.minimum(begin + part, S)
    scale *= 1.4426950408889634  # log2(e)
    q_low = _rows_of(q_ptr, offs_n, mask_n, stride_q, 0, D_LOW, D, True)
    acc_low = tl.zeros([BLOCK_N, D_LOW], tl.float32)
    if D_HIGH:
        q_high = _rows_of(q_ptr, offs_n, mask_n, stride_q, D_LOW, D_HIGH, D, True)
        acc_high = tl.zeros([BLOCK_N, D_HIGH], tl.float32)
    else:
        q_high, acc_high = q_low, acc_low  # which nothing reads
    m_i, l_i = tl.full([BLOCK_N], -1e30, tl.float32), tl.zeros([BLOCK_N], tl.float32)
    full = end - (end - begin) % BLOCK_S if HAS_REST else end
    for first in range(begin, full, BLOCK_S):
        acc_low, acc_high, m_i, l_i = _take_block(
            q_low, q_high, acc_low, acc_high, m_i, l_i, k_ptr, v_ptr, first, end, stride_k, stride_v, scale,
            D, D_LOW, D_HIGH, BLOCK_S, False, PRECISION,
        )  # fmt: skip
    if HAS_REST:
        acc_low, acc_high, m_i, l_i = _take_block(
            q_low, q_high, acc_low, acc_high, m_i, l_i, k_ptr, v_ptr, full, end, stride_k, stride_v, scale,
            D, D_LOW, D_HIGH, BLOCK_S, True, PRECISION,
        )  # fmt: skip
    if PARTS > 1:
        at = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + pid_h) * N + offs_n
        tl.store(max_ptr + at, m_i * scale, mask=mask_n)
        tl.store(sum_ptr + at, l_i, mask=mask_n)
    else:
        acc_low /= l_i[:, None]
        if D_HIGH:
            acc_high /= l_i[:, None]
    offs_d = tl.arange(0, D_LOW)
    out_ptr += tl.program_id(2).to(tl.int64) * N * C + pid_h * D
    out = acc_low.to(out_ptr.dtype.element_ty)
    mask = mask_n[:, None] & (offs_d < D)[None, :]
    tl.store(out_ptr + offs_n[:, None] * C + offs_d[None, :], out, mask=mask)
    if D_HIGH:
        offs_d = D_LOW + tl.arange(0, D_HIGH)
        out = acc_high.to(out_ptr.dtype.element_ty)
        mask = mask_n[:, None] & (offs_d < D)[None, :]
        tl.store(out_ptr + offs_n[:, None] * C + offs_d[None, :], out, mask=mask)


@jit
def _attention_combine_kernel(
    part_ptr, max_ptr, sum_ptr, out_ptr, N, C,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    pid_h, pid_b, n_heads = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    offs_n, offs_d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_d < D)[None, :]
    at = (pid_b * PARTS * n_heads + pid_h) * N + offs_n
    top = tl.full([BLOCK_N], -1e30, tl.float32)
    for i in tl.static_range(PARTS):
        top = tl.maximum(top, tl.load(max_ptr + at + i * n_heads * N, mask=mask_n, other=0.0))
    total, out = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    within = pid_h * D + offs_n[:, None] * C + offs_d[None, :]
    for i in tl.static_range(PARTS):
        weight = tl.exp2(tl.load(max_ptr + at + i * n_heads * N, mask=mask_n, other=0.0) - top)
        total += weight * tl.load(sum_ptr + at + i * n_heads * N, mask=mask_n, other=1.0)
        one = tl.load(part_ptr + (pid_b * PARTS + i) * N * C + within, mask=mask, other=0.0)
        out += weight[:, None] * one
    out = (out / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + pid_b * N * C + within, out, mask=mask)


def tile(head_dim: int, dtype: torch.dtype, programs: int = _ENOUGH) -> dict[str, int | str]:
    """Constants of a launch: the head dim and its two parts, tile sizes, the precision of products, warps, stages.

    ``programs`` are those that 128 queries each would make: where they would leave a card idle, 64 each are taken.
    """
    low = max(16, 1 << (head_dim.bit_length() - 1))
    rest = max(0, head_dim - low)
    high = max(16, next_power_of_2(rest)) if rest else 0
    block_n = 128 if programs >= _ENOUGH else 64
    return {
        "D": head_dim,
        "D_LOW": low,
        "D_HIGH": high,
        "BLOCK_N": block_n,
        "BLOCK_S": 32 if head_dim > 128 else 64,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",  # nothing but float32 has a choice
        "num_warps": 8 if head_dim > 64 and block_n == 128 else 4,
        "num_stages": 2,
    }


def launch_of(q: Tensor, k: Tensor, n_heads: int, is_split: bool) -> tuple[dict[str, int | str], int, int]:
    """Constants of a launch, into how many parts it splits the keys, and how many keys a part has."""
    (B, N, C), S = q.shape, k.shape[1]
    constants = tile(C // n_heads, q.dtype, cdiv(N, 128) * n_heads * B)
    block_n, block_s = int(constants["BLOCK_N"]), int(constants["BLOCK_S"])
    blocks, programs = cdiv(S, block_s), cdiv(N, block_n) * n_heads * B
    parts = max(1, min(blocks, _MOST_PARTS, _FILLED // programs)) if is_split and programs else 1
    each = max(1, cdiv(blocks, parts))
    rest = {"PARTS": max(1, cdiv(blocks, each)), "HAS_REST": S % block_s != 0}
    return constants | rest, rest["PARTS"], each * block_s


def attention_triton(q: Tensor, k: Tensor, v: Tensor, n_heads: int, is_split: bool = False) -> Tensor:
    """Launch the kernel; rows may be apart, as the three parts of one projection are.

    With ``is_split``, keys are split among programs where these are few, and a second launch combines the parts.
    """
    (B, N, C), S = q.shape, k.shape[1]
    if C % n_heads or C // n_heads > MAX_HEAD_DIM:
        raise ValueError(f"channels must be {n_heads} heads of at most {MAX_HEAD_DIM}, got {C}")
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.stride(2) != 1 or (len(x) > 1 and x.stride(0) != x.shape[1] * x.stride(1)):
            raise ValueError(f"{name} must be (B, N, C) with rows evenly apart, got strides {x.stride()}")
    out = q.new_empty(B, N, C)
    if not out.numel():
        return out
    constants, parts, part = launch_of(q, k, n_heads, is_split)
    into, tops, sums, D = out, out, out, C // n_heads
    if parts > 1:
        into = q.new_empty(B, parts, N, C, dtype=torch.float32)
        tops, sums = q.new_empty(2, B, parts, n_heads, N, dtype=torch.float32).unbind(0)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        _attention_fwd_kernel[(cdiv(N, int(constants["BLOCK_N"])), n_heads, B * parts)](
            q, k, v, into, tops, sums, N, S, C, q.stride(1), k.stride(1), v.stride(1), D**-0.5, part, **constants
        )  # fmt: skip
        if parts > 1:
            _attention_combine_kernel[(cdiv(N, _COMBINED), n_heads, B)](
                into, tops, sums, out, N, C, D=D, BLOCK_D=next_power_of_2(D), BLOCK_N=_COMBINED, PARTS=parts
            )  # fmt: skip
    return out


def _attention_on_cpu(q: Tensor, k: Tensor, v: Tensor, n_heads: int, is_split: bool = False) -> Tensor:  # noqa: ARG001
    return attention_ref(q, k, v, n_heads)


torch.library.impl("twinstream::attention", "cuda", attention_triton)
torch.library.impl("twinstream::attention", "cpu", _attention_on_cpu)


@torch.library.register_fake("twinstream::attention")
def _attention_fake(q: Tensor, *_arguments: Tensor | int) -> Tensor:
    return q.new_empty(q.shape)


def attention(q: Tensor, k: Tensor, v: Tensor, n_heads: int, is_split: bool = False) -> Tensor:
    """Through the dispatcher: Triton on CUDA tensors, the reference on CPU tensors. No gradient.

    Heads of more than 256 channels, of which a VAE has one, are SDPA's: no tile of ours holds them.
    """
    if q.shape[-1] // n_heads > MAX_HEAD_DIM:
        return attention_ref(q, k, v, n_heads)
    return torch.ops.twinstream.attention(q, k, v, n_heads, is_split)
