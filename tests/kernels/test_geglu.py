"""GEGLU: the kernel in the interpreter (or on a GPU), the operator's registration."""

import pytest
import torch

from engine.kernels.geglu import geglu, geglu_ref, geglu_triton
from tests.kernels.accuracy import assert_as_accurate

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 2 * 1280), (3, 2 * 37), (1, 2 * 1024), (0, 8)], ids=str)
def test_kernel(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (3 * torch.randn(shape, device=_DEVICE)).to(dtype)
    if not x.numel():
        assert geglu_triton(x).shape == (0, 4)
        return
    assert_as_accurate(geglu_triton(x), geglu_ref(x), geglu_ref(x.double()))


def test_layout_is_checked() -> None:
    with pytest.raises(ValueError, match="x must be contiguous"):
        geglu_triton(torch.zeros(4, 6).t())


def test_operator() -> None:
    x = torch.randn(2, 3, 8, device=_DEVICE)
    torch.library.opcheck(torch.ops.twinstream.geglu.default, (x,))
    torch.testing.assert_close(geglu(x), geglu_ref(x))
