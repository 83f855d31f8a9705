"""A1111's weighting notation."""

import pytest

from engine.text.weighting import parse_weights


@pytest.mark.parametrize(
    ("prompt", "text", "weights"),
    [
        ("a cat", "a cat", {}),
        ("a (cat:1.3) here", "a cat here", {"cat": 1.3}),
        ("a (cat) here", "a cat here", {"cat": 1.1}),
        ("a ((cat)) here", "a cat here", {"cat": 1.21}),
        ("a [cat] here", "a cat here", {"cat": 1 / 1.1}),
        ("((red:1.5) cat:0.5)", "red cat", {"red": 0.75, " cat": 0.5}),
        ("(red [cat]:2)", "red cat", {"red ": 2.0, "cat": 2 / 1.1}),
        (r"a \(cat\) \[x\]", "a (cat) [x]", {}),
        (r"C:\dir", r"C:\dir", {}),
        ("a (cat", "a cat", {"cat": 1.1}),
        ("a [cat", "a cat", {"cat": 1 / 1.1}),
        ("a cat) here", "a cat) here", {}),
        ("time: 12:30)", "time: 12:30)", {}),
        ("(a:b:1.5)", "a:b", {"a:b": 1.5}),
        ("(cat:-0.5)", "cat", {"cat": -0.5}),
        ("", "", {}),
    ],
)
def test_parse(prompt: str, text: str, weights: dict[str, float]) -> None:
    parsed = parse_weights(prompt)
    assert parsed.text == text
    expected = [1.0] * len(text)
    for part, weight in weights.items():
        start = text.index(part)
        expected[start : start + len(part)] = [weight] * len(part)
    assert parsed.weights == pytest.approx(expected)
