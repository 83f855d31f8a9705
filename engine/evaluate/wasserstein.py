"""2-Wasserstein distance of Gaussians fitted to latents (Infusion, arXiv:2404.14007, definition 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor


def wasserstein2_squared(one: Tensor, other: Tensor) -> float:
    """``|m1 - m2|^2 + Tr(S1) + Tr(S2) - 2 Tr((S1^1/2 S2 S1^1/2)^1/2)``, of samples of two distributions.

    The last trace is the nuclear norm of ``A B^T`` for the centred samples over ``sqrt(n - 1)``, A and B (n, d), so no
    covariance (d, d) is formed, and none has to have full rank. With n far below d the distance of a distribution to
    itself is far from 0: report it between two halves of one, too, as the floor.

    Args:
        one, other: (n, ...) and (m, ...), at least 2 samples each; computed in float64.

    Raises:
        ValueError: there are too few samples, their shapes differ, or one is not finite.
    """
    for name, samples in (("one", one), ("other", other)):
        if samples.ndim < 2 or len(samples) < 2:
            raise ValueError(f"{name} must hold at least 2 samples (n, ...), got {tuple(samples.shape)}")
        if not torch.isfinite(samples).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity in {tuple(samples.shape)}")
    if one.shape[1:] != other.shape[1:]:
        raise ValueError(f"samples must have one shape, got {tuple(one.shape[1:])} and {tuple(other.shape[1:])}")
    (mean, a), (other_mean, b) = _centred(one), _centred(other)
    products = _triangle(a) @ _triangle(b).T
    return from_moments((mean, other_mean), (float(a.square().sum()), float(b.square().sum())), products)


def from_moments(means: tuple[Tensor, Tensor], traces: tuple[float, float], products: Tensor) -> float:
    """The same of what is known of two sets of n and m samples.

    Args:
        means: (d,) of each.
        traces: of each covariance.
        products: (n, m) inner products of the centred samples of one with those of the other, over
            ``sqrt((n - 1) (m - 1))``; any rotation of samples among themselves will do.
    """
    squared = (means[0] - means[1]).square().sum() + sum(traces) - 2 * torch.linalg.svdvals(products).sum()
    return max(0.0, float(squared))


def distance_record(squared: float, floor: float, n: int) -> dict[str, float]:
    """A squared distance, its floor and both roots, as JSON holds them, with how many samples they are of."""
    numbers = {"w2": squared**0.5, "w2_squared": squared, "floor_w2": floor**0.5, "floor_w2_squared": floor}
    return {name: float(f"{value:.6g}") for name, value in numbers.items()} | {"n": n}


def _centred(samples: Tensor) -> tuple[Tensor, Tensor]:
    flat = samples.double().flatten(1)
    mean = flat.mean(dim=0)
    return mean, (flat - mean) / (len(flat) - 1) ** 0.5


def _triangle(samples: Tensor) -> Tensor:
    """R of the samples' QR decomposition where they are more than dimensions: Q changes no singular value."""
    return samples if len(samples) <= samples.shape[1] else torch.linalg.qr(samples).R
