"""What the native kernels' tests vary: instruction set, type of numbers, threads; and a card that is watched."""

from collections.abc import Iterator

import pytest
import torch

from engine.backends.native import DTYPES, LEVELS, Kernels, levels, native_ops
from engine.backends.ops import Ops
from tests.fake_cuda import Card, FakeCuda


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


@pytest.fixture
def card() -> Iterator[Card]:
    """A card that must not have seen races or anything else that a real one would not forgive."""
    with FakeCuda() as card:
        yield card
        assert not card.races, card.races[:3]
        assert not card.problems
