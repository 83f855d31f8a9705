"""Prompts that vary from seed to seed."""

import re
from collections import Counter
from pathlib import Path

import pytest

from engine.wildcards import expand, has_choices


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "colours.txt").write_text("# colours\nred\n\n  deep blue  \n{light|dark} green\n")
    (tmp_path / "animals").mkdir()
    (tmp_path / "animals" / "big_cats.txt").write_text("﻿a __colours__ lion\ntiger\n", encoding="utf-8")
    (tmp_path / "circle.txt").write_text("a __circle__\n")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    return tmp_path


def test_the_seed_decides(folder: Path) -> None:
    text = "a {small|large} __colours__ __animals/big_cats__"
    drawn = [expand(text, seed, folder) for seed in range(200)]
    assert drawn == [expand(text, seed, folder) for seed in range(200)]
    colour = "(red|deep blue|(light|dark) green)"
    assert all(re.fullmatch(rf"a (small|large) {colour} (a {colour} lion|tiger)", one) for one in drawn)
    assert len(set(drawn)) > 30
    sizes = Counter(one.split()[1] for one in drawn)
    assert min(sizes.values()) > 60
    assert expand(text, 3, folder) != expand(text, 3, folder, "negative") or expand(text, 4, folder) != expand(
        text, 4, folder, "negative"
    )


def test_choices_are_the_same_on_every_machine() -> None:
    """Pinned: they are hashes, and no library's random numbers."""
    assert [expand("{a|b|c|d}", seed, None) for seed in range(8)] == list("addbacac")


def test_choices_of_one_text_are_apart() -> None:
    pairs = {expand("{a|b} {a|b}", seed, None) for seed in range(50)}
    assert pairs == {"a a", "a b", "b a", "b b"}


@pytest.mark.parametrize(
    ("text", "outcomes"),
    [
        ("a cat", {"a cat"}),
        ("{a|}", {"a", ""}),
        ("{a|{b|c}}", {"a", "b", "c"}),
        ("{a {x|y}|b}", {"a x", "a y", "b"}),
        ("{a}", {"{a}"}),
        ("{a {x|y}}", {"{a x}", "{a y}"}),
        ("{a|b", {"{a|b"}),
        ("a|b}", {"a|b}"}),
        (r"\{a|b\}", {"{a|b}"}),
        (r"{a\}|b}", {"a}", "b"}),
        (r"\(a\) [b|c]", {r"\(a\) [b|c]"}),
        ("a __ b __ c ___", {"a __ b __ c ___"}),
    ],
)
def test_notation(text: str, outcomes: set[str]) -> None:
    assert {expand(text, seed, None) for seed in range(40)} == outcomes
    assert has_choices(text) == ("{" in text or r"\}" in text)


def test_names(folder: Path) -> None:
    assert has_choices("a __colours__")
    assert not has_choices("a snake_case__word")
    assert expand("x__colours__y", 0, folder) in {"xredy", "xdeep bluey", "xlight greeny", "xdark greeny"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__none__", "__none__ must be a .txt file in {folder}, which has animals/big_cats, circle, colours, empty"),
        ("__a/../../secret__", "__a/../../secret__ must be a .txt file in"),
        ("__circle__", "wildcards must not hold themselves, got 'a __circle__' again and again"),
        ("__empty__", "must have at least one line, got none"),
    ],
)
def test_refusals(folder: Path, text: str, message: str) -> None:
    (folder.parent / "secret.txt").write_text("x\n")
    with pytest.raises(ValueError) as caught:
        expand(text, 0, folder)
    assert message.format(folder=folder) in str(caught.value)
    with pytest.raises(ValueError, match="__colours__ needs a folder of wildcards: give --wildcards FOLDER"):
        expand("__colours__", 0, None)
