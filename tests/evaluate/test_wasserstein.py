"""The 2-Wasserstein distance against scipy's matrix square root and closed forms."""

import pytest
import torch
from scipy.linalg import sqrtm

from engine.evaluate.wasserstein import distance_record, wasserstein2_squared


def _by_matrix_root(one: torch.Tensor, other: torch.Tensor) -> float:
    (m1, s1), (m2, s2) = ((x.mean(dim=0), torch.cov(x.T)) for x in (one.double(), other.double()))
    root = sqrtm(s1.numpy())
    middle = sqrtm(root @ s2.numpy() @ root).real
    return float((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * middle.trace())


def test_agrees_with_the_formula_of_matrix_roots() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(200, 5, generator=generator) @ torch.randn(5, 5, generator=generator)
    other = torch.randn(150, 5, generator=generator) @ torch.randn(5, 5, generator=generator) + 0.7
    assert wasserstein2_squared(one, other) == pytest.approx(_by_matrix_root(one, other), rel=1e-8)


def test_of_two_lines_is_the_difference_of_means_and_deviations() -> None:
    line = torch.tensor([-1.0, 0.0, 1.0])  # standard deviation 1
    one, other = line[:, None], 3 * line[:, None] + 5
    assert wasserstein2_squared(one, other) == pytest.approx(5**2 + (3 - 1) ** 2)


def test_with_fewer_samples_than_dimensions_a_shift_is_its_square() -> None:
    one = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    assert wasserstein2_squared(one, one) == pytest.approx(0, abs=1e-9)
    assert wasserstein2_squared(one, one + 0.5) == pytest.approx(256 * 0.25, rel=1e-9)
    assert wasserstein2_squared(one, one.flip(0)) == pytest.approx(0, abs=1e-9)  # an order means nothing


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 samples"):
        wasserstein2_squared(torch.zeros(1, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="one shape"):
        wasserstein2_squared(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="other must be finite"):
        wasserstein2_squared(torch.zeros(2, 3), torch.full((2, 3), float("nan")))


def test_a_record_has_both_powers() -> None:
    found = distance_record(9.0, 4.0, 6)
    assert found == {"w2": 3.0, "w2_squared": 9.0, "floor_w2": 2.0, "floor_w2_squared": 4.0, "n": 6}
