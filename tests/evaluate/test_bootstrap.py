"""Intervals against the normal approximation, scipy's bootstrap and the one of whole groups."""

import numpy as np
import pytest
from scipy import stats

from engine.evaluate.bootstrap import estimate


def test_of_many_values_is_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = estimate(values.tolist())
    error = values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.02)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.02)


def test_agrees_with_scipy() -> None:
    values = np.random.default_rng(2).exponential(1.0, 30)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, random_state=0)
    ours = estimate(values.tolist(), resamples=20_000)
    assert (ours.low, ours.high) == pytest.approx(theirs.confidence_interval, abs=0.015)


def test_groups_are_drawn_whole() -> None:
    values = [0.0] * 50 + [1.0] * 50
    alone, grouped = estimate(values), estimate(values, ["a"] * 50 + ["b"] * 50)
    assert (alone.low, alone.high) == pytest.approx((0.4, 0.6), abs=0.02)
    assert (grouped.low, grouped.high) == (0.0, 1.0)  # two prompts say next to nothing
    assert (grouped.mean, grouped.n) == (0.5, 100)


def test_groups_of_unlike_sizes_keep_the_mean_of_values() -> None:
    found = estimate([1.0, 1.0, 1.0, 5.0], ["a", "a", "a", "b"])
    assert found.mean == 2.0
    assert (found.low, found.high) == (1.0, 5.0)


def test_record_is_rounded() -> None:
    assert estimate([1 / 3, 1 / 3]).record(2) == {"mean": 0.33, "interval": [0.33, 0.33], "n": 2}


@pytest.mark.parametrize(("values", "groups"), [([], None), ([1.0], ["a", "b"]), ([[1.0]], None)])
def test_what_has_no_mean_is_refused(values: list[float], groups: list[str] | None) -> None:
    with pytest.raises(ValueError, match="must be"):
        estimate(values, groups)
