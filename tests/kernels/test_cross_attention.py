"""Cross-attention with map columns: the kernel in the interpreter (or on a GPU), the fused eager form, the operator."""

import pytest
import torch
from torch import Tensor

from engine.kernels.cross_attention import (
    cross_attention,
    cross_attention_ref,
    cross_attention_sdpa,
    cross_attention_triton,
)
from tests.kernels.accuracy import assert_as_accurate

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_SHAPES = [  # B, N, S, heads, head dim, tokens
    (1, 64, 77, 2, 40, 1),
    (1, 70, 77, 1, 80, 2),
    (1, 9, 77, 1, 160, 1),
    (2, 33, 77, 4, 16, 3),
    (1, 5, 13, 3, 8, 0),
    (1, 9, 231, 2, 16, 2),
    (1, 9, 308, 2, 16, 2),  # more than fit into a tile
]


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    B, N, S, n_heads, D, T = shape
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, n, n_heads * D, device=_DEVICE).to(dtype) for n in (N, S, S))
    return 2 * q, k, v, torch.randint(0, S, (B, T), device=_DEVICE), n_heads


@pytest.mark.parametrize("function", [cross_attention_triton, cross_attention_sdpa])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
def test_accuracy(shape: tuple[int, ...], dtype: torch.dtype, function) -> None:
    q, k, v, tokens, n_heads = _inputs(shape, dtype)
    exact = cross_attention_ref(q.double(), k.double(), v.double(), tokens, n_heads)
    eager = cross_attention_ref(q, k, v, tokens, n_heads)
    for actual, plain, truth in zip(function(q, k, v, tokens, n_heads), eager, exact, strict=True):
        if truth.numel():
            assert_as_accurate(actual, plain, truth)
        else:
            assert actual.shape == truth.shape


def test_columns_are_those_of_the_map() -> None:
    q, k, v, _, n_heads = _inputs((2, 6, 11, 3, 8, 0), torch.float64)
    every = torch.arange(11).expand(2, -1)
    out, columns = cross_attention_ref(q, k, v, every, n_heads)
    weights = columns.unflatten(-1, (11, n_heads))  # (B, N, S, H)
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(2, 6, n_heads, dtype=torch.float64))
    mixed = torch.einsum("bnsh,bshd->bnhd", weights, v.unflatten(-1, (n_heads, -1))).flatten(2)
    torch.testing.assert_close(mixed, out)


def test_huge_logits_do_not_overflow() -> None:
    q, k, v, tokens, n_heads = _inputs((1, 5, 77, 1, 16, 1), torch.float32)
    for actual, expected in zip(
        cross_attention_triton(1e4 * q, k, v, tokens, n_heads),
        cross_attention_ref(1e4 * q, k, v, tokens, n_heads),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


def test_layout_is_checked() -> None:
    q, k, v, tokens, n_heads = _inputs((1, 4, 5, 2, 8, 1), torch.float32)
    with pytest.raises(ValueError, match="q must be contiguous"):
        cross_attention_triton(q.transpose(1, 2), k, v, tokens, n_heads)
    with pytest.raises(ValueError, match=r"k must be contiguous .* multiple of 3 heads"):
        cross_attention_triton(q[..., :15].contiguous(), k, v, tokens, 3)
    with pytest.raises(ValueError, match="tokens must be contiguous int64"):
        cross_attention_triton(q, k, v, tokens.int(), n_heads)


def test_operator() -> None:
    q, k, v, tokens, n_heads = _inputs((2, 4, 5, 2, 8, 1), torch.float32)
    torch.library.opcheck(torch.ops.twinstream.cross_attention.default, (q, k, v, tokens, n_heads))
    torch.testing.assert_close(cross_attention(q, k, v, tokens, n_heads), cross_attention_ref(q, k, v, tokens, n_heads))
