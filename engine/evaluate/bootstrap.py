"""How sure a mean is (Efron and Tibshirani 1993, chapter 13)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % percentile bootstrap interval.

    Attributes:
        mean: over all values.
        low, high: the interval's ends.
        n: how many values there are.
    """

    mean: float
    low: float
    high: float
    n: int

    def record(self, digits: int = 4) -> dict[str, object]:
        """As JSON holds it."""
        return {
            "mean": round(self.mean, digits),
            "interval": [round(self.low, digits), round(self.high, digits)],
            "n": self.n,
        }


def estimate(
    values: Sequence[float], groups: Sequence[Hashable] | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """The mean of some values.

    Args:
        values: one a picture, say.
        groups: what each value belongs to, as the pictures of one prompt do: groups are drawn whole, since their
            values are not independent. Each value is a group of its own where not given.
        resamples: how many samples are drawn.
        seed: of the draws.

    Raises:
        ValueError: there is no value, or not one group per value.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers):
        raise ValueError(f"values must be a non-empty list of numbers, got {values!r}")
    labels = list(range(len(numbers))) if groups is None else list(groups)
    if len(labels) != len(numbers):
        raise ValueError(f"groups must be one per value ({len(numbers)}), got {len(labels)}")
    numbered = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    index = np.array([numbered[label] for label in labels])
    sums = np.bincount(index, numbers)
    counts = np.bincount(index).astype(np.float64)
    drawn = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), resamples)
    low, high = np.quantile((drawn @ sums) / (drawn @ counts), (0.025, 0.975))
    return Estimate(float(numbers.mean()), float(low), float(high), len(numbers))
