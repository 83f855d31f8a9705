"""The accuracy rule of every kernel: at most twice the error of eager PyTorch at the same dtype, against float64."""

import torch
from torch import Tensor


def assert_as_accurate(actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Compare maximum absolute errors; one unit in the last place of the largest value is always allowed."""
    assert actual.shape == exact.shape
    assert actual.dtype == eager.dtype
    ulp = torch.finfo(actual.dtype).eps * float(exact.abs().max())
    error, allowed = (float((x.double() - exact).abs().max()) for x in (actual, eager))
    assert error <= 2 * allowed + ulp, f"error {error:.3e}, eager's {allowed:.3e}"
