"""Alignment, diversity and modes against worked examples."""

import math

import pytest
import torch

from engine.evaluate.similarity import image_alignment, modes, pairwise_distance, text_alignment

X, Y, DIAGONAL = [1.0, 0.0], [0.0, 1.0], [3.0, 3.0]


def test_text_alignment_is_the_cosine_with_a_pictures_own_prompt() -> None:
    found = text_alignment(torch.tensor([X, X, DIAGONAL]), torch.tensor([X, Y, X]))
    assert found.tolist() == pytest.approx([1, 0, math.sqrt(0.5)])


def test_image_alignment_is_the_mean_cosine_with_all_references() -> None:
    found = image_alignment(torch.tensor([X, DIAGONAL]), torch.tensor([X, Y, [-2.0, 0.0]]))
    assert found.tolist() == pytest.approx([0, math.sqrt(0.5) / 3])


def test_pairwise_distance_is_over_pairs_of_one_group() -> None:
    found = pairwise_distance(torch.tensor([X, X, Y, DIAGONAL, X]), ["a", "b", "a", "a", "b"])
    assert found == pytest.approx([(1 + 2 * (1 - math.sqrt(0.5))) / 3, 0], abs=1e-6)
    with pytest.raises(ValueError, match="at least 2 pictures"):
        pairwise_distance(torch.tensor([X]), ["a"])


def test_modes_are_counted_and_weighed() -> None:
    assert modes(["left", "right", "left", "right"]) == (2, pytest.approx(2.0))
    assert modes(["left"] * 5) == (1, pytest.approx(1.0))
    count, effective = modes(["a", "a", "a", "b"])
    assert count == 2
    assert effective == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
