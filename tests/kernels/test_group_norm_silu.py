"""GroupNorm+SiLU: the kernels in the interpreter (or on a GPU), the operator's registration."""

import pytest
import torch

from engine.kernels.group_norm_silu import (
    group_norm,
    group_norm_ref,
    group_norm_silu,
    group_norm_silu_ref,
    group_norm_silu_triton,
    group_norm_triton,
)
from tests.kernels.accuracy import assert_as_accurate

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, mean: float) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    x = (torch.randn(shape, device=_DEVICE) + mean).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = (torch.randn(shape[1], device=_DEVICE).to(dtype) for _ in range(2))
    return x, weight, bias


@pytest.mark.parametrize("mean", [0.0, 300.0])  # at 300 a variance as E[x^2] - E[x]^2 is lost
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 320, 8, 8), 32), ((1, 96, 9, 15), 16), ((3, 24, 1, 1), 12), ((1, 8, 70, 70), 4)], ids=str
)
def test_kernel(shape: tuple[int, ...], groups: int, dtype: torch.dtype, mean: float) -> None:
    x, weight, bias = _inputs(shape, dtype, mean)
    wide = torch.randn(shape[0], shape[1] + 8, device=_DEVICE).to(dtype)  # a part of all resnets' shifts
    for shift in (None, wide[:1, 8:].contiguous(), wide[:, 8:]):
        actual = group_norm_silu_triton(x, shift, weight, bias, groups, 1e-5)
        assert actual.is_contiguous(memory_format=torch.channels_last)
        eager = group_norm_silu_ref(x, shift, weight, bias, groups, 1e-5)
        in_double = None if shift is None else shift.double()
        exact = group_norm_silu_ref(x.double(), in_double, weight.double(), bias.double(), groups, 1e-5)
        assert_as_accurate(actual, eager, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernel_without_silu(dtype: torch.dtype) -> None:
    x, weight, bias = _inputs((2, 96, 9, 15), dtype, 0.0)
    exact = group_norm_ref(x.double(), weight.double(), bias.double(), 16, 1e-5)
    assert_as_accurate(group_norm_triton(x, weight, bias, 16, 1e-5), group_norm_ref(x, weight, bias, 16, 1e-5), exact)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_reference_is_accurate_in_every_layout(layout: torch.memory_format) -> None:
    x = (torch.randn(1, 32, 64, 64, device=_DEVICE) + 5).contiguous(memory_format=layout)
    weight, bias = torch.ones(32, device=_DEVICE), torch.zeros(32, device=_DEVICE)
    exact = torch.nn.functional.group_norm(x.double(), 8, weight.double(), bias.double(), 1e-6)
    actual = group_norm_ref(x, weight, bias, 8, 1e-6)
    assert actual.is_contiguous(memory_format=layout)
    assert float((actual - exact).norm() / exact.norm()) <= 1e-6


def test_layout_is_checked() -> None:
    with pytest.raises(ValueError, match="x must be channels-last"):
        group_norm_silu_triton(torch.zeros(2, 8, 4, 4), None, torch.ones(8), torch.zeros(8), 4, 1e-5)
    x = torch.zeros(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"shift must be \(1 or 2, 8\), its channels side by side, got \(3, 8\)"):
        group_norm_silu_triton(x, torch.zeros(3, 8), torch.ones(8), torch.zeros(8), 4, 1e-5)


def test_operators() -> None:
    x, weight, bias = _inputs((2, 8, 4, 4), torch.float32, 0.0)
    shift = torch.randn(2, 8, device=_DEVICE)
    for arguments in ((x, shift, weight, bias, 4, 1e-5), (x, None, weight, bias, 4, 1e-5)):
        torch.library.opcheck(torch.ops.twinstream.group_norm_silu.default, arguments)
        torch.testing.assert_close(group_norm_silu(*arguments), group_norm_silu_ref(*arguments))
    torch.library.opcheck(torch.ops.twinstream.group_norm.default, (x, weight, bias, 4, 1e-5))
    torch.testing.assert_close(group_norm(x, weight, bias, 4, 1e-5), group_norm_ref(x, weight, bias, 4, 1e-5))
