"""GroupNorm+SiLU: the kernels in the interpreter (or on a GPU), the operator's registration."""

import pytest
import torch

from engine.kernels import group_norm_silu as module
from engine.kernels.group_norm_silu import (
    alone_tile,
    chunks_of,
    group_norm,
    group_norm_ref,
    group_norm_silu,
    group_norm_silu_ref,
    group_norm_silu_triton,
    group_norm_triton,
    launches_for,
    shared_tile,
)
from tests.kernels.accuracy import assert_as_accurate

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, mean: float) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    x = (torch.randn(shape, device=_DEVICE) + mean).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = (torch.randn(shape[1], device=_DEVICE).to(dtype) for _ in range(2))
    return x, weight, bias


@pytest.mark.parametrize("mean", [0.0, 300.0])  # at 300 a variance as E[x^2] - E[x]^2 is lost
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("launches", [1, 2])
@pytest.mark.parametrize(
    ("shape", "groups"),
    # groups of no power of two, one position, more groups than a program's; several blocks of a program, and chunks
    [((2, 70, 8, 8), 7), ((1, 42, 9, 15), 7), ((3, 12, 1, 1), 6), ((1, 120, 20, 20), 2), ((1, 8, 70, 70), 4)],
    ids=str,
)
def test_kernel(shape: tuple[int, ...], groups: int, launches: int, dtype: torch.dtype, mean: float) -> None:
    x, weight, bias = _inputs(shape, dtype, mean)
    wide = torch.randn(shape[0], shape[1] + 8, device=_DEVICE).to(dtype)  # a part of all resnets' shifts
    for shift in (wide[:, 8:],) if mean else (None, wide[:1, 8:].contiguous(), wide[:, 8:]):
        actual = group_norm_silu_triton(x, shift, weight, bias, groups, 1e-5, launches)
        assert actual.is_contiguous(memory_format=torch.channels_last)
        eager = group_norm_silu_ref(x, shift, weight, bias, groups, 1e-5)
        in_double = None if shift is None else shift.double()
        exact = group_norm_silu_ref(x.double(), in_double, weight.double(), bias.double(), groups, 1e-5)
        assert_as_accurate(actual, eager, exact)


@pytest.mark.parametrize("launches", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernel_without_silu(dtype: torch.dtype, launches: int) -> None:
    x, weight, bias = _inputs((2, 48, 9, 15), dtype, 0.0)
    exact = group_norm_ref(x.double(), weight.double(), bias.double(), 16, 1e-5)
    actual = group_norm_triton(x, weight, bias, 16, 1e-5, launches)
    assert_as_accurate(actual, group_norm_ref(x, weight, bias, 16, 1e-5), exact)


@pytest.mark.parametrize("launches", [1, 2])
def test_values_that_are_all_alike(launches: int) -> None:
    """Their variance is 0, and what rounding leaves of it must not be below."""
    x, weight, bias = _inputs((1, 12, 20, 20), torch.float32, 0.0)
    for value in (0.0, 300.0):
        actual = group_norm_triton(torch.full_like(x, value), weight, bias, 2, 1e-5, launches)
        torch.testing.assert_close(actual, bias[None, :, None, None].expand(x.shape))
    assert torch.isfinite(group_norm_triton(torch.full_like(x, 1e8), weight, bias, 2, 1e-5, launches)).all()


def test_chunks_of_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_CHUNKS", 3)
    monkeypatch.setattr(module, "_POSITIONS", 16)
    assert chunks_of(150, 16) == (64, 3)  # of four blocks, but for the last: 22 positions
    x, weight, bias = _inputs((2, 12, 10, 15), torch.float32, 30.0)
    exact = group_norm_silu_ref(x.double(), None, weight.double(), bias.double(), 3, 1e-5)
    actual = group_norm_silu_triton(x, None, weight, bias, 3, 1e-5, 2)
    assert_as_accurate(actual, group_norm_silu_ref(x, None, weight, bias, 3, 1e-5), exact)


def test_sizes_of_programs() -> None:
    assert [launches_for(side * side) for side in (8, 16, 32, 64, 512)] == [1, 1, 1, 2, 2]
    for N, group in ((64, 40), (256, 80), (1024, 60), (4096, 10), (9, 1)):
        tile = alone_tile(N, group)
        assert tile["BLOCK_N"] * tile["BLOCK_G"] <= 1 << 14
        assert tile["IS_HELD"] == (tile["BLOCK_N"] >= N)
    for N, group, groups in ((4096, 10, 32), (1024, 60, 32), (1 << 18, 4, 32), (9, 1, 2)):
        tile = shared_tile(N, group, groups)
        chunk, n_chunks = chunks_of(N, tile["BLOCK_N"])
        assert n_chunks <= 256
        assert (n_chunks - 1) * chunk < N <= n_chunks * chunk
        assert tile["GROUPS"] * tile["BLOCK_G"] <= 128


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
    with pytest.raises(ValueError, match="launches must be 1 or 2, or 0 for what suits the size, got 3"):
        group_norm_triton(x, torch.ones(8), torch.zeros(8), 4, 1e-5, 3)


def test_operators() -> None:
    x, weight, bias = _inputs((2, 8, 4, 4), torch.float32, 0.0)
    shift = torch.randn(2, 8, device=_DEVICE)
    for arguments in (
        (x, shift, weight, bias, 4, 1e-5),
        (x, None, weight, bias, 4, 1e-5),
        (x, None, weight, bias, 4, 1e-5, 2),
    ):
        torch.library.opcheck(torch.ops.twinstream.group_norm_silu.default, arguments)
        torch.testing.assert_close(group_norm_silu(*arguments), group_norm_silu_ref(*arguments[:6]))
    torch.library.opcheck(torch.ops.twinstream.group_norm.default, (x, weight, bias, 4, 1e-5))
    torch.testing.assert_close(group_norm(x, weight, bias, 4, 1e-5), group_norm_ref(x, weight, bias, 4, 1e-5))
