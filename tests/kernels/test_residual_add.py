"""The end of a residual block: the kernel in the interpreter (or on a GPU), the operator's registration."""

import pytest
import torch

from engine.kernels.residual_add import residual_add, residual_add_ref, residual_add_triton
from tests.kernels.accuracy import assert_as_accurate

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    pictures = (torch.randn(shape, device=_DEVICE).to(dtype) for _ in range(2))
    x, residual = (picture.contiguous(memory_format=torch.channels_last) for picture in pictures)
    return x, residual, torch.randn(shape[1], device=_DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 320, 4, 4), (1, 33, 5, 7), (1, 1, 1, 1)], ids=str)
def test_kernel(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = _inputs(shape, dtype)
    actual = residual_add_triton(*inputs)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert_as_accurate(actual, residual_add_ref(*inputs), residual_add_ref(*(x.double() for x in inputs)))


def test_layout_is_checked() -> None:
    x, residual, bias = _inputs((2, 8, 4, 4), torch.float32)
    with pytest.raises(ValueError, match=r"residual must be channels-last \(2, 8, 4, 4\), got \(1, 8, 4, 4\)"):
        residual_add_triton(x, residual[:1], bias)
    with pytest.raises(ValueError, match="x must be channels-last"):
        residual_add_triton(x.contiguous(), residual, bias)
    assert residual_add_triton(x[:0], residual[:0], bias).shape == (0, 8, 4, 4)


def test_operator() -> None:
    inputs = _inputs((2, 8, 4, 4), torch.float32)
    torch.library.opcheck(torch.ops.twinstream.residual_add.default, inputs)
    torch.testing.assert_close(residual_add(*inputs), residual_add_ref(*inputs))
