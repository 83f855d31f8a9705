"""The two-value form: the kernel in the interpreter (or on a GPU), its gradient, the operator."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engine.kernels.cross_attention import cross_attention_ref
from engine.kernels.cross_attention_pair import (
    cross_attention_pair,
    cross_attention_pair_ref,
    cross_attention_pair_triton,
)
from engine.kernels.residual_apply import residual_apply_ref
from tests.kernels.accuracy import assert_as_accurate

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_SHAPES = [(1, 33, 77, 2, 40, 1), (2, 6, 77, 1, 80, 2), (1, 17, 9, 3, 16, 2)]  # B, N, S, heads, head dim, tokens


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    B, N, S, n_heads, D, T = shape
    torch.manual_seed(0)
    q, k, v, r = (torch.randn(B, n, n_heads * D, device=_DEVICE).to(dtype) for n in (N, S, S, T))
    return q, k, v, torch.randint(0, S, (B, T), device=_DEVICE), r, n_heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
def test_kernel(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v, tokens, r, n_heads = _inputs(shape, dtype)
    exact = cross_attention_pair_ref(q.double(), k.double(), v.double(), tokens, r.double(), n_heads)
    eager = cross_attention_pair_ref(q, k, v, tokens, r, n_heads)
    actual = cross_attention_pair_triton(q, k, v, tokens, r, n_heads)
    for i in range(2):
        assert_as_accurate(actual[i], eager[i], exact[i])


def test_zero_residual_is_the_base_to_the_bit() -> None:
    q, k, v, tokens, r, n_heads = _inputs(_SHAPES[0], torch.float32)
    out, out_residual = cross_attention_pair_triton(q, k, v, tokens, torch.zeros_like(r), n_heads)
    assert torch.equal(out, out_residual)


def test_residuals_on_one_token_add_up() -> None:
    q, k, v, tokens, r, n_heads = _inputs(_SHAPES[2], torch.float64)
    same = tokens[:, :1].expand(-1, 2).contiguous()
    both = cross_attention_pair_ref(q, k, v, same, r, n_heads)[1]
    summed = cross_attention_pair_ref(q, k, v, same[:, :1], r.sum(dim=1, keepdim=True), n_heads)[1]
    torch.testing.assert_close(both, summed)


def test_gradient() -> None:
    q, k, v, tokens, r, n_heads = _inputs((1, 4, 5, 2, 4, 2), torch.float64)
    r.requires_grad_()
    assert torch.autograd.gradcheck(lambda r: cross_attention_pair(q, k, v, tokens, r, n_heads)[1], (r,))


def test_operator() -> None:
    inputs = _inputs((2, 4, 5, 2, 8, 1), torch.float32)
    torch.library.opcheck(torch.ops.twinstream.cross_attention_pair.default, inputs)
    torch.testing.assert_close(cross_attention_pair(*inputs), cross_attention_pair_ref(*inputs))


def test_the_engines_way_is_this_form_in_a_fraction_of_its_arithmetic() -> None:
    """Columns and projected residuals, at SD v1.5's 64x64 layers, against both outputs projected."""
    B, N, S, n_heads, D = 1, 4096, 77, 8, 40
    C = n_heads * D
    torch.manual_seed(0)
    q, k, v, r, x = (torch.randn(B, n, C) for n in (N, S, S, 1, N))
    tokens, project, bias = torch.tensor([[5]]), torch.randn(C, C) / C**0.5, torch.randn(C)
    with FlopCounterMode(display=False) as base:
        out, columns = cross_attention_ref(q, k, v, tokens, n_heads)
        out = torch.nn.functional.linear(out, project, bias)
    with FlopCounterMode(display=False) as followed:
        heads = torch.einsum("chd,hd->hc", project.unflatten(1, (n_heads, D)), r[0, 0].unflatten(0, (n_heads, D)))
        actual = residual_apply_ref(x, out, columns, torch.tensor([0]), heads[None])
    with FlopCounterMode(display=False) as literal:
        _, custom = cross_attention_pair_ref(q, k, v, tokens, r, n_heads)
        expected = x + torch.nn.functional.linear(custom, project, bias)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    second = 2 * N * C * (S + C)  # P V and the projection once more
    assert literal.get_total_flops() >= base.get_total_flops()
    assert followed.get_total_flops() * 40 <= second
