"""Following rows: the kernel in the interpreter (or on a GPU), its gradient, the operator."""

import pytest
import torch
from torch import Tensor

from engine.kernels.residual_apply import residual_apply, residual_apply_ref, residual_apply_triton
from tests.kernels.accuracy import assert_as_accurate

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_SHAPES = [(1, 1, 64, 64, 8), (3, 2, 37, 320, 8), (2, 1, 9, 48, 24)]  # followers, leaders, N, C, K


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_followers, n_leaders, N, C, K = shape
    torch.manual_seed(0)
    x, out = (torch.randn(rows, N, C, device=_DEVICE).to(dtype) for rows in (n_followers, n_leaders))
    columns = torch.rand(n_leaders, N, K, device=_DEVICE).to(dtype)
    leaders = torch.arange(n_followers, device=_DEVICE) % n_leaders
    return x, out, columns, leaders, torch.randn(n_followers, K, C, device=_DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
def test_kernel(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, out, columns, leaders, residuals = _inputs(shape, dtype)
    exact = residual_apply_ref(x.double(), out.double(), columns.double(), leaders, residuals.double())
    eager = residual_apply_ref(x, out, columns, leaders, residuals)
    assert_as_accurate(residual_apply_triton(x, out, columns, leaders, residuals), eager, exact)


@pytest.mark.parametrize("function", [residual_apply_triton, residual_apply_ref])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_zero_residual_is_the_foundation_to_the_bit(dtype: torch.dtype, function) -> None:
    x, out, columns, leaders, residuals = _inputs(_SHAPES[1], dtype)
    followed = function(x, out, columns, leaders, torch.zeros_like(residuals))
    assert torch.equal(followed, x + out[leaders])


def test_layout_is_checked() -> None:
    x, out, columns, leaders, residuals = _inputs(_SHAPES[2], torch.float32)
    with pytest.raises(ValueError, match="residuals must be contiguous"):
        residual_apply_triton(x, out, columns, leaders, residuals.transpose(1, 2))


def test_gradient() -> None:
    x, out, columns, leaders, residuals = _inputs((3, 2, 3, 4, 5), torch.float64)
    x.requires_grad_()
    residuals.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, r: residual_apply_ref(x, out, columns, leaders, r), (x, residuals))


def test_operator() -> None:
    inputs = _inputs(_SHAPES[2], torch.float32)
    torch.library.opcheck(torch.ops.twinstream.residual_apply.default, inputs)
    torch.testing.assert_close(residual_apply(*inputs), residual_apply_ref(*inputs))
