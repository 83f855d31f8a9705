"""Noise schedules by name: the noise levels ``sigma / alpha`` at which a sampler evaluates the model."""

from __future__ import annotations

import numpy as np

_KARRAS_RHO = 7.0
_BETA_SHAPE = 0.6
# Where Align Your Steps evaluates SD v1.5 in ten steps (Sabour et al. 2024, arXiv:2404.14507), and the end
_AYS_TIMESTEPS = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0)
NAMES = ("karras", "exponential", "beta", "ays")


def noise_levels(name: str, steps: int, high: float, low: float, ratios: np.ndarray) -> np.ndarray:
    """The levels (steps,) of a schedule, descending.

    "karras": Karras et al. 2022 (arXiv:2206.00364, eq. 5). "exponential": even in the logarithm. "beta": quantiles of a
    Beta(0.6, 0.6) distribution (Lee et al. 2024, arXiv:2407.12173), denser at both ends. "ays": Align Your Steps, whose
    ten levels other numbers of steps interpolate in the logarithm.

    Args:
        name: one of ``NAMES``.
        steps: how many.
        high, low: the first level and the last.
        ratios: (num_train_timesteps,) the training schedule's, which "ays" picks from in place of both.

    Raises:
        ValueError: "ays" on another number of training timesteps than it was optimised for.
    """
    ramp = np.linspace(0, 1, steps)
    if name == "karras":
        return (high ** (1 / _KARRAS_RHO) * (1 - ramp) + low ** (1 / _KARRAS_RHO) * ramp) ** _KARRAS_RHO
    if name == "exponential":
        return np.exp(np.log(high) * (1 - ramp) + np.log(low) * ramp)
    if name == "beta":
        return low + beta_quantile(1 - ramp, _BETA_SHAPE) * (high - low)
    if len(ratios) != _AYS_TIMESTEPS[0] + 1:
        raise ValueError(f"schedule 'ays' needs {_AYS_TIMESTEPS[0] + 1} training timesteps, got {len(ratios)}")
    known = np.log(ratios[list(_AYS_TIMESTEPS)])
    return np.exp(np.interp(np.linspace(0, len(known) - 1, steps + 1)[:-1], np.arange(len(known)), known))


def beta_quantile(u: np.ndarray, a: float) -> np.ndarray:
    """Where the distribution function of Beta(a, a) is ``u``, by bisection."""
    half = np.minimum(u, 1 - u)  # it is symmetric
    low, high = np.zeros_like(half), np.full_like(half, 0.5)
    whole = 2 * _incomplete_beta(np.array(0.5), a)
    for _ in range(60):
        middle = (low + high) / 2
        below = _incomplete_beta(middle, a) < half * whole
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    x = np.where(half > 0, (low + high) / 2, 0.0)
    return np.where(u < 0.5, x, 1 - x)


def _incomplete_beta(x: np.ndarray, a: float) -> np.ndarray:
    """The integral of ``(t (1 - t))^(a - 1)`` from 0 to x <= 1/2, by its power series."""
    k = np.arange(60)
    factors = np.cumprod(np.append(1.0, (k[:-1] + 1 - a) / (k[:-1] + 1)))  # of (1 - t)^(a - 1)
    return x**a * np.sum(factors / (a + k) * x[..., None] ** k, axis=-1)
