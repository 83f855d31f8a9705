"""The process-wide flags that a table of choices is for."""

from collections.abc import Iterator

import pytest
import torch

from engine.backends.calibration.flags import get_flags, set_flags


@pytest.fixture(autouse=True)
def before() -> Iterator[None]:
    kept = get_flags()
    yield
    set_flags(kept)


@pytest.mark.parametrize("value", [True, False])
def test_tf32_is_read_whichever_way_it_was_set(value: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = value
    assert get_flags()["matmul.allow_tf32"] == value
    torch.backends.cuda.matmul.fp32_precision = "ieee" if value else "tf32"
    assert get_flags()["matmul.allow_tf32"] != value


def test_flags_come_back_as_they_were() -> None:
    kept = get_flags()
    set_flags({name: not value for name, value in kept.items()})
    assert get_flags() == {name: not value for name, value in kept.items()}
    set_flags(kept)
    assert get_flags() == kept
