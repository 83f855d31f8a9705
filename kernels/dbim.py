"""Dual-Branch Integration Module: two branches' cross-attention, mixed per position (DCI, ECCV 2024, eq. 3 to 5).

For a concept row c and an auxiliary row a, per head, with ``A`` a row's attention map over the text:

    P = softmax(tau_t A[:, 1..n])            over the prompt's own n tokens,
    m = sum of P over the row's chosen tokens,
    s = g softmax(tau_s m)                   over the N positions,
    w = sigmoid(s_c - lambda s_a),
    O_c <- w O_c + (1 - w) O_a;              O_a stays.

The printed form ("logits") has ``m`` as a sum of logits ``Q K^T / sqrt(D)`` over the chosen tokens instead.

Two passes: the first reduces ``exp(tau_s m)`` over space, block by block; the second forms the maps again, which is
cheaper than keeping masks and both outputs, and mixes. Neither map nor mask leaves the chip. With more than 256 keys,
of long prompts, a row of the map would not fit into a tile, and the reference serves.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# (triton declares constexpr arguments as objects; launches pass plain numbers)

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cross_attention import MOST_KEYS, check_layout, map_tile, tile
from .jit import cdiv, jit, next_power_of_2

if TYPE_CHECKING:
    import triton.language as tl

_SIGNATURE = (
    "(Tensor q, Tensor k, Tensor v, Tensor chosen, Tensor lengths, Tensor gates, int n_heads, bool logits) -> Tensor"
)
torch.library.define("twinstream::dbim", _SIGNATURE)


def dbim_masks_ref(
    q: Tensor, k: Tensor, chosen: Tensor, lengths: Tensor, gates: Tensor, n_heads: int, logits: bool
) -> Tensor:
    """The masks ``m`` (2M, H, N) before the spatial softmax, at least float32; arguments as of ``dbim_ref``."""
    scores = _scores(q, k, n_heads)
    return _masks(scores, None if logits else _softmax(scores), chosen, lengths, gates)


def _scores(q: Tensor, k: Tensor, n_heads: int) -> Tensor:
    q, k = (x.unflatten(-1, (n_heads, -1)).transpose(1, 2) for x in (q, k))
    return q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, H, N, S)


def _softmax(scores: Tensor) -> Tensor:
    return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def _masks(scores: Tensor, weights: Tensor | None, chosen: Tensor, lengths: Tensor, gates: Tensor) -> Tensor:
    """From the map, or from logits where there is none. Sums over tokens are products with their indicators."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    chosen = chosen[:, None, :, None].to(wide)
    if weights is None:
        return (scores.to(wide) @ chosen)[..., 0]
    positions = torch.arange(scores.shape[-1], device=scores.device)
    own = ((positions >= 1) & (positions <= lengths[:, None]))[:, None, :, None].to(wide)
    weights = weights * own.transpose(-1, -2)
    token_scale = gates[:, 1].to(wide).repeat(2)[:, None, None, None]
    sharpened = (token_scale * (weights - weights.amax(dim=-1, keepdim=True))).exp()
    among_chosen, among_own = (sharpened @ torch.cat([chosen, own], dim=-1)).unbind(-1)
    return among_chosen / among_own


def dbim_ref(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, lengths: Tensor, gates: Tensor, n_heads: int, logits: bool
) -> Tensor:
    """Eager DBIM with explicit maps and masks.

    Args:
        q: (2M, N, H*D) queries, heads packed along the last axis: M concept rows, then their M auxiliary rows.
        k, v: (2M, S, H*D) keys and values, dtype of ``q``.
        chosen: (2M, S) bool, the tokens whose attention makes up a row's mask, all within 1..lengths.
        lengths: (2M,) int64, the number n of the prompt's own tokens, which are keys 1..n.
        gates: (M, 4) float32: lambda, tau_t, tau_s and g of each pair.
        n_heads: H.
        logits: whether masks are sums of logits, as printed; tau_t then plays no part.

    Returns:
        (2M, N, H*D): mixed outputs of the concept rows, and the auxiliary rows' own.
    """
    scores = _scores(q, k, n_heads)
    weights = _softmax(scores)
    masks = _masks(scores, None if logits else weights, chosen, lengths, gates)
    strength, _, space_scale, gain = gates.to(masks.dtype)[:, :, None, None].unbind(1)  # (M, 1, 1)
    concept, auxiliary = (gain * (space_scale * mask).softmax(dim=-1) for mask in masks.chunk(2))
    share = torch.sigmoid(concept - strength * auxiliary)[..., None]  # (M, H, N, 1)
    out = weights.to(v.dtype) @ v.unflatten(-1, (n_heads, -1)).transpose(1, 2)
    concept, auxiliary = out.chunk(2)
    mixed = (share * concept + (1 - share) * auxiliary).to(out.dtype)
    return torch.cat([mixed, auxiliary]).transpose(1, 2).flatten(2)


@jit
def _mask_of_tile(p, q_ptr, k_ptr, offs_n, chosen, length, N, S, C, scale, token_scale, LOGITS: tl.constexpr,
                  D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """``m`` (BLOCK_N,) of a map tile ``p``; logits are formed anew where they are asked for."""
    offs_s = tl.arange(0, BLOCK_S)
    if LOGITS:
        scores = tl.zeros([BLOCK_N, BLOCK_S], tl.float32)
        for first in range(0, D, CHUNK):
            offs_d = first + tl.arange(0, CHUNK)
            mask_q = (offs_n < N)[:, None] & (offs_d < D)[None, :]
            mask_k = (offs_s < S)[None, :] & (offs_d < D)[:, None]
            q = tl.load(q_ptr + offs_n[:, None] * C + offs_d[None, :], mask=mask_q, other=0.0)
            k = tl.load(k_ptr + offs_s[None, :] * C + offs_d[:, None], mask=mask_k, other=0.0)
            scores = tl.dot(q, k, scores, input_precision=PRECISION)
        return tl.sum(tl.where(chosen[None, :], scores * scale, 0.0), axis=1)
    own = (offs_s >= 1) & (offs_s <= length)
    p = tl.where(own[None, :], p, 0.0)
    sharpened = tl.where(own[None, :], tl.exp(token_scale * (p - tl.max(p, axis=1)[:, None])), 0.0)
    return tl.sum(tl.where(chosen[None, :], sharpened, 0.0), axis=1) / tl.sum(sharpened, axis=1)


@jit
def _map_and_mask(
    q_ptr, k_ptr, chosen_ptr, lengths_ptr, row, pid_h, offs_n, N, S, C, scale, token_scale,
    LOGITS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows ``offs_n`` of the map and of ``m``, for one row of the batch and one head."""
    offs_s = tl.arange(0, BLOCK_S)
    q_ptr += row * N * C + pid_h * D
    k_ptr += row * S * C + pid_h * D
    chosen = tl.load(chosen_ptr + row * S + offs_s, mask=offs_s < S, other=0) != 0
    length = tl.load(lengths_ptr + row)
    p = map_tile(q_ptr, k_ptr, offs_n, N, S, C, scale, D, BLOCK_N, BLOCK_S, CHUNK, PRECISION)
    m = _mask_of_tile(p, q_ptr, k_ptr, offs_n, chosen, length, N, S, C, scale, token_scale,
                      LOGITS, D, BLOCK_N, BLOCK_S, CHUNK, PRECISION)  # fmt: skip
    return p, m


@jit
def _dbim_space_kernel(
    q_ptr, k_ptr, chosen_ptr, lengths_ptr, gates_ptr, partial_ptr, N, S, C, n_heads, n_pairs, scale,
    LOGITS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pid_n, pid_h, pid_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    token_scale = tl.load(gates_ptr + pid_b % n_pairs * 4 + 1)
    space_scale = tl.load(gates_ptr + pid_b % n_pairs * 4 + 2)
    _, m = _map_and_mask(q_ptr, k_ptr, chosen_ptr, lengths_ptr, pid_b, pid_h, offs_n, N, S, C, scale, token_scale,
                         LOGITS, D, BLOCK_N, BLOCK_S, CHUNK, PRECISION)  # fmt: skip
    m = tl.where(offs_n < N, m, float("-inf"))
    peak = tl.max(m, axis=0)
    at = ((pid_b * n_heads + pid_h) * tl.num_programs(0) + pid_n) * 2
    tl.store(partial_ptr + at, peak)
    tl.store(partial_ptr + at + 1, tl.sum(tl.where(offs_n < N, tl.exp(space_scale * (m - peak)), 0.0), axis=0))


@jit
def _gate_of_tile(m, partial_ptr, n_blocks, space_scale, gain, BLOCK_BLOCKS: tl.constexpr):
    """``s`` (BLOCK_N,): the spatial softmax, from the first pass's maxima and sums of one row and head."""
    offs = tl.arange(0, BLOCK_BLOCKS)
    peaks = tl.load(partial_ptr + 2 * offs, mask=offs < n_blocks, other=float("-inf"))
    sums = tl.load(partial_ptr + 2 * offs + 1, mask=offs < n_blocks, other=0.0)
    peak = tl.max(peaks, axis=0)
    scaled = tl.where(offs < n_blocks, sums * tl.exp(space_scale * (peaks - peak)), 0.0)
    return gain * tl.exp(space_scale * (m - peak)) / tl.sum(scaled, axis=0)


@jit
def _dbim_mix_kernel(
    q_ptr, k_ptr, v_ptr, chosen_ptr, lengths_ptr, gates_ptr, partial_ptr, out_ptr, N, S, C, n_heads, n_pairs, scale,
    LOGITS: tl.constexpr, BLOCK_BLOCKS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid_n, pid_h, pid_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n_blocks = tl.num_programs(0)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_s = tl.arange(0, BLOCK_S)
    mask_n, mask_s = offs_n < N, offs_s < S
    row_a = pid_b + n_pairs
    strength, token_scale = tl.load(gates_ptr + pid_b * 4), tl.load(gates_ptr + pid_b * 4 + 1)
    space_scale, gain = tl.load(gates_ptr + pid_b * 4 + 2), tl.load(gates_ptr + pid_b * 4 + 3)
    p_c, m = _map_and_mask(q_ptr, k_ptr, chosen_ptr, lengths_ptr, pid_b, pid_h, offs_n, N, S, C, scale, token_scale,
                           LOGITS, D, BLOCK_N, BLOCK_S, CHUNK, PRECISION)  # fmt: skip
    partial_c = partial_ptr + (pid_b * n_heads + pid_h) * n_blocks * 2
    s_c = _gate_of_tile(m, partial_c, n_blocks, space_scale, gain, BLOCK_BLOCKS)
    p_c = p_c.to(v_ptr.dtype.element_ty)
    p_a, m = _map_and_mask(q_ptr, k_ptr, chosen_ptr, lengths_ptr, row_a, pid_h, offs_n, N, S, C, scale, token_scale,
                           LOGITS, D, BLOCK_N, BLOCK_S, CHUNK, PRECISION)  # fmt: skip
    partial_a = partial_ptr + (row_a * n_heads + pid_h) * n_blocks * 2
    s_a = _gate_of_tile(m, partial_a, n_blocks, space_scale, gain, BLOCK_BLOCKS)
    p_a = p_a.to(v_ptr.dtype.element_ty)
    v_c, v_a = v_ptr + pid_b * S * C + pid_h * D, v_ptr + row_a * S * C + pid_h * D
    w = tl.sigmoid(s_c - strength * s_a)[:, None]
    for first in range(0, C // n_heads, CHUNK):  # D, but unknown when compiling: a loop of one trip unrolls and spills
        offs_d = first + tl.arange(0, CHUNK)
        mask_d = offs_d < D
        mask_v = mask_s[:, None] & mask_d[None, :]
        at_v = offs_s[:, None] * C + offs_d[None, :]
        o_c = tl.dot(p_c, tl.load(v_c + at_v, mask=mask_v, other=0.0), input_precision=PRECISION)
        o_a = tl.dot(p_a, tl.load(v_a + at_v, mask=mask_v, other=0.0), input_precision=PRECISION)
        at = offs_n[:, None] * C + pid_h * D + offs_d[None, :]
        mask = mask_n[:, None] & mask_d[None, :]
        mixed = w * o_c + (1.0 - w) * o_a
        tl.store(out_ptr + pid_b * N * C + at, mixed.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out_ptr + row_a * N * C + at, o_a.to(out_ptr.dtype.element_ty), mask=mask)


def tile_pair(q: Tensor, k: Tensor, n_heads: int) -> dict[str, int | str]:
    """Constants of a launch: smaller tiles where two maps at a time would spill, or need too much shared memory.

    They would at the smallest head dims, and in float32, where cards of compute capability 8.6 and 8.9 have too little.
    """
    constants = tile(q, k, n_heads)
    is_small = q.shape[-1] // n_heads <= 16 or q.dtype == torch.float32
    return constants | {"BLOCK_N": 32} if is_small else constants


def dbim_triton(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, lengths: Tensor, gates: Tensor, n_heads: int, logits: bool
) -> Tensor:
    """Launch both passes on contiguous tensors."""
    check_layout(n_heads, lengths, q=q, k=k, v=v)
    (B, N, C), S = q.shape, k.shape[1]
    if chosen.dtype != torch.bool or not chosen.is_contiguous():
        raise ValueError(f"chosen must be contiguous bool, got {chosen.dtype}, strides {chosen.stride()}")
    if gates.dtype != torch.float32 or gates.shape != (B // 2, 4) or not gates.is_contiguous():
        raise ValueError(f"gates must be contiguous float32 ({B // 2}, 4), got {gates.dtype} {tuple(gates.shape)}")
    if S > MOST_KEYS:
        return dbim_ref(q, k, v, chosen, lengths, gates, n_heads, logits)
    out = torch.empty_like(q)
    if not out.numel():
        return out
    constants = tile_pair(q, k, n_heads) | {"LOGITS": logits}
    n_blocks = cdiv(N, constants["BLOCK_N"])
    partial = q.new_empty(B, n_heads, n_blocks, 2, dtype=torch.float32)
    scale = (C // n_heads) ** -0.5
    with torch.cuda.device_of(q):  # Triton launches on the current device
        _dbim_space_kernel[(n_blocks, n_heads, B)](
            q, k, chosen, lengths, gates, partial, N, S, C, n_heads, B // 2, scale, **constants
        )  # fmt: skip
        _dbim_mix_kernel[(n_blocks, n_heads, B // 2)](
            q, k, v, chosen, lengths, gates, partial, out, N, S, C, n_heads, B // 2, scale,
            BLOCK_BLOCKS=next_power_of_2(n_blocks), **constants,
        )  # fmt: skip
    return out


torch.library.impl("twinstream::dbim", "cuda", dbim_triton)
torch.library.impl("twinstream::dbim", "cpu", dbim_ref)


@torch.library.register_fake("twinstream::dbim")
def _dbim_fake(q: Tensor, *_arguments: Tensor | float) -> Tensor:
    return torch.empty_like(q)


def dbim(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, lengths: Tensor, gates: Tensor, n_heads: int, logits: bool
) -> Tensor:
    """Through the dispatcher: Triton on CUDA tensors, the reference on CPU tensors. No gradient."""
    return torch.ops.twinstream.dbim(q, k, v, chosen, lengths, gates, n_heads, logits)
