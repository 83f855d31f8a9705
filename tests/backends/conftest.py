"""What the native kernels' tests vary: instruction set, type of numbers, threads."""

from collections.abc import Iterator

import pytest
import torch

from engine.backends.native import DTYPES, LEVELS, Kernels, levels, native_ops
from engine.backends.ops import Ops


@pytest.fixture(params=LEVELS)
def ops(request: pytest.FixtureRequest) -> Ops:
    if request.param not in levels():
        pytest.skip(f"this processor runs {', '.join(levels())}")
    return native_ops(request.param)


@pytest.fixture
def kernels(ops: Ops) -> Kernels:
    """Those behind ``ops``."""
    return ops.attention.__self__


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
