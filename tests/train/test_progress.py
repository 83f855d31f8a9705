"""The progress bar: shown where nobody said otherwise."""

from collections.abc import Callable

import numpy as np
import pytest

import engine

_PICTURES = [np.zeros((16, 16, 3), dtype=np.uint8)]


def _drawn(sd: engine.Engine, **options) -> None:
    sd.generate("a cat", steps=2, seed=0, output="latent", **options)


def _trained(sd: engine.Engine, **options) -> None:
    engine.train_infusion(sd, _PICTURES, "cat", steps=2, batch_size=1, **options)


def _trained_ico(sd: engine.Engine, **options) -> None:
    engine.train_ico(sd, _PICTURES, "cat", steps=2, batch_size=1, **options)


@pytest.mark.parametrize("work", [_drawn, _trained, _trained_ico])
def test_progress_is_shown_unless_refused(
    small: engine.Engine, work: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    work(small)
    assert "2/2" in capsys.readouterr().err
    work(small, progress=False)
    assert "2/2" not in capsys.readouterr().err
