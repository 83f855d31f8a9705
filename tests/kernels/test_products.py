"""Fused products: the kernels in the interpreter (or on a GPU), the operators' registrations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels.layer_norm_geglu import layer_norm_geglu, layer_norm_geglu_ref, layer_norm_geglu_triton
from engine.kernels.layer_norm_linear import layer_norm_linear, layer_norm_linear_ref, layer_norm_linear_triton
from engine.kernels.linear_add import linear_add, linear_add_ref, linear_add_triton
from tests.kernels.accuracy import assert_as_accurate

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_BFLOAT16 = pytest.param(  # which products of the interpreter do not know
    torch.bfloat16, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
)
_OPS: dict[str, tuple[Callable[..., Tensor], ...]] = {
    "layer_norm_linear": (layer_norm_linear_triton, layer_norm_linear_ref, layer_norm_linear),
    "layer_norm_geglu": (layer_norm_geglu_triton, layer_norm_geglu_ref, layer_norm_geglu),
    "linear_add": (linear_add_triton, linear_add_ref, linear_add),
    "linear_add of two": (linear_add_triton, linear_add_ref, linear_add),
}


def _inputs(op: str, shape: tuple[int, int, int, int], dtype: torch.dtype, mean: float = 0.0) -> list[Any]:
    """Arguments for rows (B, N), C_in and C_out."""
    torch.manual_seed(0)
    B, N, C, C_out = shape

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, device=_DEVICE)).to(dtype)

    x, share = draw(B, N, C) + mean, C**-0.5
    if op.startswith("linear_add"):
        second = [draw(B, N, 3 * C), draw(C_out, 3 * C, scale=share)] if op.endswith("two") else []
        return [x, draw(C_out, C, scale=share), draw(C_out), draw(B, N, C_out), *second]
    norm = [draw(C), draw(C), 1e-5]
    if op == "layer_norm_linear":
        return [x, *norm, draw(C_out, C, scale=share)]
    return [x, *norm, draw(2 * C_out, C, scale=share), draw(2 * C_out)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, _BFLOAT16], ids=str)
@pytest.mark.parametrize("shape", [(2, 70, 40, 96), (1, 9, 33, 7), (1, 130, 320, 64), (3, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("op", _OPS)
def test_kernel(op: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    inputs = _inputs(op, shape, dtype)
    kernel, ref, _ = _OPS[op]
    exact = ref(*(x.double() if isinstance(x, Tensor) else x for x in inputs))
    assert_as_accurate(kernel(*inputs), ref(*inputs), exact)
    if dtype == torch.float16:
        assert_as_accurate(kernel(*inputs, tma=False), ref(*inputs), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, _BFLOAT16], ids=str)
@pytest.mark.parametrize("op", ["layer_norm_linear", "layer_norm_geglu"])
def test_a_large_mean(op: str, dtype: torch.dtype) -> None:
    inputs = _inputs(op, (1, 20, 64, 32), dtype, mean=300.0)
    kernel, ref, _ = _OPS[op]
    exact = ref(*(x.double() if isinstance(x, Tensor) else x for x in inputs))
    assert_as_accurate(kernel(*inputs), ref(*inputs), exact)


@pytest.mark.parametrize("op", _OPS)
def test_operators(op: str) -> None:
    inputs = _inputs(op, (2, 5, 8, 6), torch.float32)
    _, ref, function = _OPS[op]
    inputs += [None, None] if op == "linear_add" else []
    torch.library.opcheck(getattr(torch.ops.twinstream, op.split(maxsplit=1)[0]).default, tuple(inputs))
    torch.testing.assert_close(function(*inputs), ref(*inputs))


def test_bad_inputs_are_refused() -> None:
    x, weight, bias, residual = _inputs("linear_add", (2, 5, 8, 6), torch.float32)
    with pytest.raises(ValueError, match="weight must be contiguous"):
        linear_add_triton(x, weight.t().contiguous().t(), bias, residual)
    with pytest.raises(ValueError, match="z and z_weight must be given together, got True and False"):
        linear_add_triton(x, weight, bias, residual, x)
    assert linear_add_triton(x[:0], weight, bias, residual[:0]).shape == (0, 5, 6)
