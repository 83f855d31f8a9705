"""3x3 convolutions by minimal filtering, at every level this processor runs: accuracy, borders, tasks, the choice."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.backends.native import Kernels, is_filtering_faster, levels, native_kernels
from engine.kernels.conv3x3 import conv3x3_ref
from engine.models.layers import Conv3x3, pack_convolutions
from tests.backends.test_native import _random

pytestmark = pytest.mark.skipif(not levels(), reason="native kernels are not built here")

_TOLERANCE = 1e-6  # of one layer in float32; oneDNN's direct convolutions err by 3e-8 to 1.3e-6 at these sizes
_SHAPES = [  # B, C, height, width, C_out
    (2, 64, 8, 8, 96),
    (1, 128, 16, 16, 48),
    (2, 20, 9, 12, 70),
    (1, 65, 4, 13, 17),
    (3, 33, 5, 7, 50),
    (1, 8, 43, 46, 20),  # more tiles than a strip
    (1, 200, 6, 6, 33),
    (2, 640, 4, 5, 20),
    (1, 3, 2, 3, 1),
    (1, 1, 1, 1, 3),
]


@pytest.fixture
def with_threads() -> Any:
    """Runs a function with so many threads."""
    before = torch.get_num_threads()

    def run(threads: int, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        torch.set_num_threads(threads)
        return function(*arguments)

    yield run
    torch.set_num_threads(before)


def _inputs(B: int, C: int, height: int, width: int, n_out: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = _random(B, height, width, C, dtype=torch.float32).permute(0, 3, 1, 2)
    weight = _random(n_out, 3, 3, C, dtype=torch.float32).permute(0, 3, 1, 2) * (9 * C) ** -0.5
    return x, weight, _random(n_out, dtype=torch.float32)


@pytest.mark.parametrize("shape", _SHAPES, ids=str)
def test_filtering(kernels: Kernels, shape: tuple[int, ...]) -> None:
    x, weight, bias = _inputs(*shape)
    for offset in (bias, None):
        exact = F.conv2d(x.double(), weight.double(), None if offset is None else offset.double(), padding=1)
        y = kernels.filtered_conv3x3(x, weight, offset)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert float((y.double() - exact).norm() / exact.norm()) < _TOLERANCE


def test_every_tap_and_border(kernels: Kernels) -> None:
    """One weight at a time moves the picture, and what comes from outside is zero."""
    x = _inputs(1, 2, 6, 9, 1)[0]
    for i in range(3):
        for j in range(3):
            weight = torch.zeros(1, 2, 3, 3).contiguous(memory_format=torch.channels_last)
            weight[0, 1, i, j] = 1.0
            moved = F.pad(x, (1, 1, 1, 1))[:, 1:, i : i + 6, j : j + 9]
            torch.testing.assert_close(kernels.filtered_conv3x3(x, weight, None), moved, rtol=1e-6, atol=3e-6)


@pytest.mark.parametrize("shape", [(2, 70, 8, 8, 130), (1, 5, 44, 48, 9)], ids=str)
def test_the_result_depends_neither_on_threads_nor_on_the_batch(
    kernels: Kernels, with_threads: Any, shape: tuple[int, ...]
) -> None:
    x, weight, bias = _inputs(*shape)
    first, *others = (with_threads(n, kernels.filtered_conv3x3, x, weight, bias) for n in (1, 2, 3, 7))
    assert all(torch.equal(first, other) for other in others)
    assert torch.equal(kernels.filtered_conv3x3(x[-1:], weight, bias), first[-1:])


def test_refusals(kernels: Kernels) -> None:
    x, weight, bias = _inputs(1, 8, 4, 4, 8)
    with pytest.raises(ValueError, match=r"minimal filtering takes float32, got torch\.bfloat16"):
        kernels.filtered_conv3x3(*(tensor.bfloat16() for tensor in (x, weight, bias)))
    with pytest.raises(ValueError, match="one dtype"):
        kernels.filtered_conv3x3(x, weight.double(), bias)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.filtered_conv3x3(x, weight.contiguous(), bias)
    with pytest.raises(ValueError, match=r"weight must be \(O, 8, 3, 3\), got \(8, 4, 3, 3\)"):
        kernels.filtered_conv3x3(x, _inputs(1, 4, 4, 4, 8)[1], bias)
    with pytest.raises(RuntimeError, match="no gradients"):
        kernels.filtered_conv3x3(x.clone().requires_grad_(), weight, bias)


def test_the_choice_goes_by_counts() -> None:
    for sizes in ((320, 64, 64, 320), (1280, 16, 16, 1280), (1280, 8, 8, 1280), (128, 512, 512, 128), (64, 16, 16, 64)):
        assert is_filtering_faster(*sizes)
    assert is_filtering_faster(96, 8, 16, 96)
    assert not is_filtering_faster(160, 8, 8, 96)
    assert not is_filtering_faster(1280, 4, 8, 1280)
    assert not is_filtering_faster(64, 2, 2, 64)
    assert not is_filtering_faster(16, 128, 128, 16)  # few channels: mostly transforms
    assert not is_filtering_faster(128, 512, 512, 3)


def test_a_convolution_takes_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = native_kernels()
    x, weight, bias = _inputs(1, 24, 25, 25, 24)
    filtered = kernels.filtered_conv3x3(x, weight, bias)
    for is_faster, expected in ((True, filtered), (False, conv3x3_ref(x, weight, bias))):
        monkeypatch.setattr("engine.backends.native.is_filtering_faster", lambda *_, chosen=is_faster: chosen)
        assert torch.equal(kernels.conv3x3(x, weight, bias), expected)
        half = [tensor.bfloat16() for tensor in (x, weight, bias)]
        assert torch.equal(kernels.conv3x3(*half), conv3x3_ref(*half))
    assert not torch.equal(filtered, expected)


def test_a_module_keeps_its_parameters_and_leaves_the_bias_where_asked() -> None:
    torch.manual_seed(0)
    kernels = native_kernels()
    x, weight, bias = _inputs(1, 32, 24, 24, 32)
    conv = Conv3x3(32, 32, kernels)  # pyright: ignore[reportArgumentType]
    conv.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    model = torch.nn.Sequential(conv.requires_grad_(False))
    pack_convolutions(model)
    assert model[0] is conv
    assert torch.equal(model(x), kernels.filtered_conv3x3(x, weight, bias))
    assert torch.equal(conv.without_bias(x), kernels.filtered_conv3x3(x, weight, None))
