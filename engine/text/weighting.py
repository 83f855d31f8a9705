"""Prompt weighting in the notation that A1111 and ComfyUI share.

``(word)`` multiplies the attention paid to a word by 1.1, ``[word]`` divides it by 1.1, ``(word:1.3)`` multiplies it
by 1.3; brackets nest, and a backslash makes one literal. An unclosed bracket reaches to the end of the prompt, and an
unopened one is literal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_BRACKET_WEIGHT = 1.1
_TOKEN = re.compile(r"\\[\\()\[\]]|[()\[\]]|:\s*([+-]?\d*\.?\d+)\s*\)|[^\\()\[\]:]+|[\\:]")


@dataclass(frozen=True, slots=True)
class WeightedPrompt:
    """A prompt without its weighting marks, and the weight of each of its characters."""

    text: str
    weights: tuple[float, ...]


def parse_weights(prompt: str) -> WeightedPrompt:
    """Split a prompt into its text and per-character weights (1.0 where nothing is marked)."""
    characters: list[str] = []
    weights: list[float] = []
    opened: list[tuple[str, int]] = []  # bracket, and where its content starts

    def scale(start: int, factor: float) -> None:
        weights[start:] = [weight * factor for weight in weights[start:]]

    for match in _TOKEN.finditer(prompt):
        piece, number = match.group(0), match.group(1)
        if piece in "([":
            opened.append((piece, len(characters)))
        elif number is not None and opened and opened[-1][0] == "(":
            scale(opened.pop()[1], float(number))
        elif piece in ")]" and opened and opened[-1][0] == "(["[")]".index(piece)]:
            bracket, start = opened.pop()
            scale(start, _BRACKET_WEIGHT if bracket == "(" else 1 / _BRACKET_WEIGHT)
        else:
            literal = piece[1:] if len(piece) == 2 and piece[0] == "\\" else piece
            characters += literal
            weights += [1.0] * len(literal)
    for bracket, start in reversed(opened):
        scale(start, _BRACKET_WEIGHT if bracket == "(" else 1 / _BRACKET_WEIGHT)
    return WeightedPrompt("".join(characters), tuple(weights))
