"""Multi-head attention ``softmax(Q K^T / sqrt(D)) V`` over packed heads (Vaswani et al. 2017, arXiv:1706.03762)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


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
