"""Cross-attention that also returns columns of its map: ``P = softmax(Q K^T / sqrt(D))``, ``O = P V``, ``p_k = P e_k``.

Customisation acts on single tokens (Infusion, arXiv:2404.14007, eq. 6), so of the N x S map only the columns of a few
tokens are ever needed, and the map itself never leaves the chip. The text's S keys fit into one tile: the softmax
needs no running maximum; with more than 256 keys, of long prompts, columns are further outputs of torch's attention.
Head dims are walked in chunks that divide them, so 40, 80 and 160 pad to 48, 80 and 160.
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

MOST_KEYS = 256  # of a tile

_BLOCK_N = 64
_N_WARPS = 8  # with 4, head dims of 160 spill

torch.library.define(
    "twinstream::cross_attention", "(Tensor q, Tensor k, Tensor v, Tensor tokens, int n_heads) -> (Tensor, Tensor)"
)


def cross_attention_ref(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
    """Cross-attention with an explicit map.

    Args:
        q: (B, N, H*D) queries, heads packed along the last axis.
        k, v: (B, S, H*D) keys and values, dtype of ``q``.
        tokens: (B, T) int64, the keys whose columns are wanted, each in 0..S-1.
        n_heads: H.

    Returns:
        ``O`` (B, N, H*D), and the columns (B, N, T*H), heads last; both of ``q``'s dtype.
    """
    q, k, v = (x.unflatten(-1, (n_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, N, D)
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)  # (B, H, N, S)
    wanted = tokens[:, None, None, :].expand(*weights.shape[:3], -1)
    columns = weights.gather(-1, wanted).permute(0, 2, 3, 1).flatten(2).contiguous()
    return (weights @ v).transpose(1, 2).flatten(2), columns


def cross_attention_sdpa(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
    """The same through ``scaled_dot_product_attention``, without a map in memory.

    Columns are outputs too: ``P [V | E] = [O | P E]``, where E holds the unit vectors of the tokens. Zeros appended
    to queries and keys keep the head dims equal, which the fused kernels ask for.
    """
    D, T = q.shape[-1] // n_heads, tokens.shape[1]
    padding = -(D + T) % 8 + T
    keys = torch.arange(k.shape[1], device=tokens.device)
    units = (keys[:, None] == tokens[:, None, :]).to(v.dtype)  # (B, S, T)
    units = F.pad(units, (0, padding - T))[:, None].expand(-1, n_heads, -1, -1)
    q, k, v = (x.unflatten(-1, (n_heads, -1)).transpose(1, 2) for x in (q, k, v))
    both = F.scaled_dot_product_attention(
        F.pad(q, (0, padding)), F.pad(k, (0, padding)), torch.cat([v, units], dim=-1), scale=D**-0.5
    )
    columns = both[..., D : D + T].permute(0, 2, 3, 1).flatten(2).contiguous()
    return both[..., :D].transpose(1, 2).flatten(2), columns


@jit
def map_tile(
    q_ptr, k_ptr, offs_n, N, S, C, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows ``offs_n`` of one head's map, (BLOCK_N, BLOCK_S) float32; ``q_ptr`` and ``k_ptr`` point at that head."""
    offs_s = tl.arange(0, BLOCK_S)
    mask_n, mask_s = offs_n < N, offs_s < S
    logits = tl.zeros([BLOCK_N, BLOCK_S], tl.float32)
    for first in range(0, D, CHUNK):
        offs_d = first + tl.arange(0, CHUNK)
        mask_d = offs_d < D
        q = tl.load(q_ptr + offs_n[:, None] * C + offs_d[None, :], mask=mask_n[:, None] & mask_d[None, :], other=0.0)
        k = tl.load(k_ptr + offs_s[None, :] * C + offs_d[:, None], mask=mask_s[None, :] & mask_d[:, None], other=0.0)
        logits = tl.dot(q, k, logits, input_precision=PRECISION)
    logits = tl.where(mask_s[None, :], logits * (scale * 1.4426950408889634), float("-inf"))  # log2(e)
    p = tl.exp2(logits - tl.max(logits, axis=1)[:, None])
    return p / tl.sum(p, axis=1)[:, None]


@jit
def _cross_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, tokens_ptr, out_ptr, columns_ptr, N, S, C, T, n_heads, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid_h, pid_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_s = tl.arange(0, BLOCK_S)
    mask_n = offs_n < N
    at_q, at_k = pid_b * N * C + pid_h * D, pid_b * S * C + pid_h * D
    p = map_tile(q_ptr + at_q, k_ptr + at_k, offs_n, N, S, C, scale, D, BLOCK_N, BLOCK_S, CHUNK, PRECISION)
    for t in range(T):
        token = tl.load(tokens_ptr + pid_b * T + t)
        column = tl.sum(tl.where(offs_s[None, :] == token, p, 0.0), axis=1)
        at = (pid_b * N + offs_n) * (T * n_heads) + t * n_heads + pid_h
        tl.store(columns_ptr + at, column.to(columns_ptr.dtype.element_ty), mask=mask_n)
    p = p.to(v_ptr.dtype.element_ty)
    for first in range(0, D, CHUNK):
        offs_d = first + tl.arange(0, CHUNK)
        mask_d = offs_d < D
        mask_v = (offs_s < S)[:, None] & mask_d[None, :]
        v = tl.load(v_ptr + at_k + offs_s[:, None] * C + offs_d[None, :], mask=mask_v, other=0.0)
        out = tl.dot(p, v, input_precision=PRECISION)
        at = at_q + offs_n[:, None] * C + offs_d[None, :]
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_d[None, :])


def tile(q: Tensor, k: Tensor, n_heads: int) -> dict[str, int | str]:
    """Constants of a launch: the head dim, tile sizes, the precision of products, and warps."""
    D = q.shape[-1] // n_heads
    chunk = next((size for size in (64, 32) if D % size == 0), 16)
    precision = "ieee" if q.dtype == torch.float32 else "tf32"  # nothing but float32 has a choice
    block_s = max(16, next_power_of_2(k.shape[1]))
    return {
        "D": D,
        "BLOCK_N": _BLOCK_N,
        "BLOCK_S": block_s,
        "CHUNK": chunk,
        "PRECISION": precision,
        "num_warps": _N_WARPS,
    }


def check_layout(n_heads: int, tokens: Tensor, **inputs: Tensor) -> None:
    """Refuse tensors the kernels cannot walk."""
    for name, x in inputs.items():
        if x.ndim != 3 or not x.is_contiguous() or x.shape[-1] % n_heads:
            rule = f"{name} must be contiguous (B, N, C) with C a multiple of {n_heads} heads"
            raise ValueError(f"{rule}, got {tuple(x.shape)}, strides {x.stride()}")
    if tokens.dtype != torch.int64 or not tokens.is_contiguous():
        raise ValueError(f"tokens must be contiguous int64, got {tokens.dtype}, strides {tokens.stride()}")


def cross_attention_triton(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
    """Launch the kernel on contiguous tensors."""
    check_layout(n_heads, tokens, q=q, k=k, v=v)
    if k.shape[1] > MOST_KEYS:
        return cross_attention_sdpa(q, k, v, tokens, n_heads)
    (B, N, C), S, T = q.shape, k.shape[1], tokens.shape[1]
    out, columns = torch.empty_like(q), q.new_empty(B, N, T * n_heads)
    if not out.numel():
        return out, columns
    constants = tile(q, k, n_heads)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        _cross_attention_fwd_kernel[(cdiv(N, _BLOCK_N), n_heads, B)](
            q, k, v, tokens, out, columns, N, S, C, T, n_heads, (C // n_heads) ** -0.5, **constants
        )  # fmt: skip
    return out, columns


torch.library.impl("twinstream::cross_attention", "cuda", cross_attention_triton)
torch.library.impl("twinstream::cross_attention", "cpu", cross_attention_ref)


@torch.library.register_fake("twinstream::cross_attention")
def _cross_attention_fake(
    q: Tensor,
    k: Tensor,  # noqa: ARG001
    v: Tensor,  # noqa: ARG001
    tokens: Tensor,
    n_heads: int,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(*q.shape[:2], tokens.shape[1] * n_heads)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
    """Through the dispatcher: Triton on CUDA tensors, the reference on CPU tensors. No gradient."""
    return torch.ops.twinstream.cross_attention(q, k, v, tokens, n_heads)
