"""How long prompts are split: by length, at commas, at BREAK, never within a learned word."""

import pytest
import torch

import engine
from engine.text.chunks import Piece, segments, split

_COMMA = 7


def _pieces(ids: list[int], first: int = 0) -> list[Piece]:
    return [Piece(id, (first + i, first + i + 1), None) for i, id in enumerate(ids)]


def _sizes(*parts: list[int], room: int = 75) -> list[int]:
    """Of the chunks of some parts; the tokens must all be there, in order."""
    chunks = split([_pieces(ids) for ids in parts], room, _COMMA)
    assert [piece.id for chunk in chunks for piece in chunk] == [id for ids in parts for id in ids]
    return [len(chunk) for chunk in chunks]


def test_length() -> None:
    assert _sizes([1] * 75) == [75]
    assert _sizes([1] * 76) == [75, 1]
    assert _sizes([1] * 151) == [75, 75, 1]
    assert _sizes([]) == [0]


@pytest.mark.parametrize(
    ("comma_at", "sizes"),
    [
        (54, [75, 5]),  # 21 tokens would move
        (55, [56, 24]),  # as A1111's backtrack of 20: the comma and 19 more
        (73, [74, 6]),
        (74, [75, 5]),
        (75, [75, 5]),  # the comma itself did not fit
    ],
)
def test_a_full_chunk_ends_behind_its_last_comma(comma_at: int, sizes: list[int]) -> None:
    ids = [1] * 80
    ids[comma_at] = _COMMA
    assert _sizes(ids) == sizes


def test_commas_of_one_chunk_do_not_count_in_the_next() -> None:
    ids = [1] * 160
    ids[70] = _COMMA
    assert _sizes(ids) == [71, 75, 14]
    ids[130] = _COMMA
    assert _sizes(ids) == [71, 60, 29]


def test_breaks() -> None:
    assert segments("a BREAK b BREAKS break") == [(0, 2), (7, 22)]
    assert _sizes([1, 1], [1]) == [2, 1]
    assert _sizes([1], []) == [1], "a chunk that nothing follows is not begun"
    assert _sizes([1], [], [1]) == [1, 0, 1]
    assert _sizes([], [1]) == [0, 1]
    assert _sizes([], []) == [0]
    assert _sizes([_COMMA, *[1] * 74], [1] * 76) == [75, 75, 1]


def test_a_learned_word_stays_whole() -> None:
    vector = torch.zeros(1)
    word = [Piece(1, (73, 74), vector)] * 4
    chunks = split([[*_pieces([1] * 73), *word, *_pieces([1], 80)]], 75, _COMMA)
    assert [len(chunk) for chunk in chunks] == [73, 5]
    twice = [*word, *[Piece(1, (75, 76), vector)] * 4]
    assert [len(chunk) for chunk in split([[*_pieces([1] * 69), *twice]], 75, _COMMA)] == [73, 4]


def test_tokens(small: engine.Engine) -> None:
    text = small.text_encoder
    tokens = text.tokenize("(red:1.5) " + "red " * 74 + "cat BREAK a (boat:0.5)")
    assert tokens.sizes == (75, 1, 2)
    assert len(tokens.ids) == len(tokens.weights) == 3 * 77
    begin, end = text.tokenizer.bos_token_id, text.tokenizer.eos_token_id
    red, cat, a, boat = (text.tokenize(word).ids[1] for word in ("red", "cat", "a", "boat"))
    assert tokens.ids == (
        *(begin, *[red] * 75, end),
        *(begin, cat, *[end] * 75),
        *(begin, a, boat, *[end] * 74),
    )
    assert tokens.positions == [*range(1, 76), 78, 155, 156]
    assert {i: weight for i, weight in enumerate(tokens.weights) if weight != 1.0} == {1: 1.5, 156: 0.5}
    assert [tokens.text[start:stop] for start, stop in tokens.spans[-3:]] == ["cat", "a", "boat"]


def test_other_ways(small: engine.Engine) -> None:
    text = small.text_encoder
    prompt = "red " * 75 + "blue BREAK cat"
    assert text.tokenize(prompt, long_prompts="truncate").cut_off == "blue BREAK cat"
    assert text.tokenize(prompt, long_prompts="truncate").sizes == (75,)
    for long in ("red " * 75 + "cat", "red BREAK cat"):
        with pytest.raises(ValueError, match="must fit into one chunk of 75 tokens with long_prompts='error', got"):
            text.tokenize(long, long_prompts="error")
    assert text.tokenize("red " * 75, long_prompts="error") == text.tokenize("red " * 75)
    with pytest.raises(ValueError, match="long_prompts must be one of chunk, truncate, error, got 'cut'"):
        small.generate("a cat", long_prompts="cut")
    with pytest.raises(ValueError, match="a word must stand for at most 75 vectors, got 76: 'v"):
        text.tokenize("a v*", {"v*": torch.zeros(76, 32)})
