"""A1111's notation for prompts that change over the steps."""

import pytest

import engine
from engine.text.editing import texts_over_steps, unedited


@pytest.mark.parametrize(
    ("prompt", "runs"),
    [
        ("a cat", {0: "a cat"}),
        ("a [cat:dog:0.3] here", {0: "a cat here", 3: "a dog here"}),
        ("a [cat:dog:.3]", {0: "a cat", 3: "a dog"}),
        ("a [cat:dog:4]", {0: "a cat", 4: "a dog"}),
        ("a [cat:dog: 4 ]", {0: "a cat", 4: "a dog"}),
        ("a [cat:dog:1]", {0: "a cat", 1: "a dog"}),
        ("a [cat:dog:1.0]", {0: "a cat"}),
        ("a [cat:dog:0]", {0: "a dog"}),
        ("a [cat:dog:-2]", {0: "a dog"}),
        ("a [cat:dog:40]", {0: "a cat"}),
        ("a[ dog:5]", {0: "a", 5: "a dog"}),
        ("a[: dog:5]", {0: "a", 5: "a dog"}),
        ("a[ cat::5]", {0: "a cat", 5: "a"}),
        ("a [b : c : 1] d", {0: "a b  d", 1: "a  c  d"}),
        ("a[b:[c:d:2]:1]e", {0: "abe", 1: "ace", 2: "ade"}),
        ("[a:b:3][c:d:0.5]", {0: "ac", 3: "bc", 5: "bd"}),
        ("[(a:1.2):3]", {0: "", 3: "(a:1.2)"}),
        ("a [[[b]]:2]", {0: "a ", 2: "a [[b]]"}),
        ("(a [b:c:2]:1.3)", {0: "(a b:1.3)", 2: "(a c:1.3)"}),
        ("[a|b] x", {i: f"{'ab'[i % 2]} x" for i in range(10)}),
        ("[a|b|]", {i: ("a", "b", "")[i % 3] for i in range(10)}),
        ("[a|[b:c:5]]", {i: ("a", "b" if i < 5 else "c")[i % 2] for i in range(10)}),
        ("[[a|b]:c:2]", {0: "a", 1: "b", 2: "c"}),
        ("a [word]", {0: "a [word]"}),
        ("a [word:more]", {0: "a [word:more]"}),
        ("a [b:c:d:3]", {0: "a [b:c:d:3]"}),
        ("a [b|c:3]", {0: "a [b|c:3]"}),
        ("a [open", {0: "a [open"}),
        ("((a][:b:c [d:3]", {0: "((a][:b:c ", 3: "((a][:b:c d"}),
        (r"\[a:b:3\]", {0: r"\[a:b:3\]"}),
        (r"[a\|b:c:3]", {0: r"a\|b", 3: "c"}),
        ("a | b [c:3]", {0: "a | b ", 3: "a | b c"}),
        ("a (b] [c:3]", {0: "a (b] ", 3: "a (b] c"}),
        ("at 12:30 [c::3]", {0: "at 12:30 c", 3: "at 12:30 "}),
    ],
)
def test_texts(prompt: str, runs: dict[int, str]) -> None:
    assert texts_over_steps(prompt, 10, 10) == tuple(runs.items())


def test_shares_are_of_all_steps_and_counted_from_the_first_taken() -> None:
    assert texts_over_steps("[a:b:0.25]", 20, 8) == ((0, "a"), (5, "b"))
    assert texts_over_steps("[a:b:0.5]", 20, 8) == ((0, "a"),)


def test_one_text_has_an_encoding(small: engine.Engine) -> None:
    assert unedited("a [cat] (dog:1.2)") == "a [cat] (dog:1.2)"
    assert unedited("a [cat:dog:0] here") == "a dog here"
    assert unedited("a [cat:dog:1.0] here") == "a cat here"
    with pytest.raises(ValueError, match=r"changes over the steps has no encoding of its own, got '\[a\|b\] cat'"):
        small.encode_prompt(["a cat", "[a|b] cat"])
