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
    shared = torch.linalg.svdvals(_triangle(a) @ _triangle(b).T).sum()
    squared = (mean - other_mean).square().sum() + a.square().sum() + b.square().sum() - 2 * shared
    return max(0.0, float(squared))


def distance_record(reference: Tensor, samples: Tensor, base: Tensor) -> dict[str, float]:
    """Both powers of the distance of ``samples`` from ``reference``, and its floor, as JSON holds them.

    Args:
        reference: (n, ...) of the base model.
        samples: (m, ...) of the customised one.
        base: (m, ...) of the base model again, with other seeds: its distance is the floor.
    """
    squared, floor = (wasserstein2_squared(reference, one) for one in (samples, base))
    numbers = {"w2": squared**0.5, "w2_squared": squared, "floor_w2": floor**0.5, "floor_w2_squared": floor}
    return {name: float(f"{value:.6g}") for name, value in numbers.items()} | {"n": len(samples)}


def _centred(samples: Tensor) -> tuple[Tensor, Tensor]:
    flat = samples.double().flatten(1)
    mean = flat.mean(dim=0)
    return mean, (flat - mean) / (len(flat) - 1) ** 0.5


def _triangle(samples: Tensor) -> Tensor:
    """R of the samples' QR decomposition where they are more than dimensions: Q changes no singular value."""
    return samples if len(samples) <= samples.shape[1] else torch.linalg.qr(samples).R
