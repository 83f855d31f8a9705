"""Words are tied to things: phrases, nouns, and the loss on where nouns attend."""

import itertools

import pytest
import torch
from transformers import CLIPTokenizer

from benchmarks.tinyworld.captions import phrase_starts
from benchmarks.tinyworld.grounding import place_loss, read_words
from benchmarks.tinyworld.scene import Scene, Thing
from engine.weights.checkpoint import EMBEDDED_MODEL


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        ("a photo of a red cat on the left, on the beach", ["on the beach"]),
        ("a blue dog wearing a hat and a green mug in the woods", ["and a green mug ", "in the woods"]),
        ("a sketch of a shoe on a plain blue background", ["on a plain blue background"]),
        ("a bear", []),
    ],
)
def test_phrases_start_at_other_things_and_backgrounds(caption: str, phrases: list[str]) -> None:
    starts = [*phrase_starts(caption), len(caption)]
    assert [caption[a:b] for a, b in itertools.pairwise(starts)] == phrases


def test_words_see_their_own_phrase_and_padding_sees_nothing() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED_MODEL / "tokenizer")
    scene = Scene((Thing("cat", "red"), Thing("mug", "blue")), "beach")
    words = read_words(tokenizer, ["a red cat and a mug on the beach", ""], [scene, scene])
    assert words.ids.shape == (2, 77)
    assert words.nouns[0].tolist() == [3, 6]
    assert words.named.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    visible = words.own_phrase[0, 0] == 0
    assert visible[3, :10].tolist() == [True] * 4 + [False] * 6  # "cat": the start and "a red cat"
    assert visible[6, :10].tolist() == [True, False, False, False, True, True, True, False, False, False]
    assert not visible[10:, 1:10].any()  # end of text and padding


def test_a_map_on_its_object_costs_nothing_and_others_cost() -> None:
    covered = torch.zeros(1, 1, 8, 8)
    covered[:, :, 4:, 4:] = 1
    right = 0.5 * covered.flatten(2).transpose(1, 2).expand(-1, -1, 3)  # three heads
    weights = torch.ones(1, 1)
    assert place_loss([right], covered, weights) == 0
    assert place_loss([torch.zeros(1, 64, 3)], covered, weights) == pytest.approx(0.3)
    assert place_loss([0.5 - right], covered, weights) == pytest.approx(0.3 + 0.5)
    assert place_loss([torch.zeros(1, 16, 3), right], covered, weights) == pytest.approx(0.15)  # coarser layers too
    assert place_loss([0.5 - right], covered, torch.zeros(1, 1)) == 0
