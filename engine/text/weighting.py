"""Prompt weighting in the notation that A1111 and ComfyUI share, and their two rules for what a weight does.

``(word)`` multiplies the attention paid to a word by 1.1, ``[word]`` divides it by 1.1, ``(word:1.3)`` multiplies it
by 1.3; brackets nest, and a backslash makes one literal. An unclosed bracket reaches to the end of the prompt, and an
unopened one is literal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

WEIGHTINGS = ("a1111", "comfyui")

_BRACKET_WEIGHT = 1.1
_NO_MEAN = 1e-3  # of the spread; SD v1.5's is a tenth of it
_TOKEN = re.compile(r"\\[\\()\[\]]|[()\[\]]|:\s*([+-]?\d*\.?\d+)\s*\)|[^\\()\[\]:]+|[\\:]")


@dataclass(frozen=True, slots=True)
class WeightedPrompt:
    """A prompt without its weighting marks, and the weight of each of its characters."""

    text: str
    weights: tuple[float, ...]

    def replaced(self, start: int, end: int, words: str) -> WeightedPrompt:
        """The same with other words in a place, which get the mean weight of the characters that were there."""
        weight = sum(self.weights[start:end]) / (end - start)
        return WeightedPrompt(
            self.text[:start] + words + self.text[end:],
            (*self.weights[:start], *[weight] * len(words), *self.weights[end:]),
        )


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


def apply_weights(context: Tensor, weights: Tensor, empty: Tensor, rule: str) -> Tensor:
    """Embeddings with their tokens' weights applied; rows whose weights are all 1 stay as they are, to the bit.

    "a1111": a token's embedding is multiplied by its weight, and then all of the prompt's by one factor that gives its
    mean back, where it has one to speak of. "comfyui": a token's embedding moves away from the empty prompt's at its
    position, ``empty + w (embedding - empty)``.

    Args:
        context: (B, 77, E) embeddings.
        weights: (B, 77) float32.
        empty: (1, 77, E), the empty prompt's.
        rule: one of ``WEIGHTINGS``.
    """
    exact, factors = context.float(), weights[:, :, None]
    if rule == "a1111":
        scaled = exact * factors
        mean, spread = scaled.mean(dim=(1, 2), keepdim=True), scaled.std(dim=(1, 2), keepdim=True)
        restored = scaled * (exact.mean(dim=(1, 2), keepdim=True) / mean)
        weighted = torch.where(mean.abs() < _NO_MEAN * spread, scaled, restored)
    else:
        weighted = torch.where(factors == 1.0, exact, empty.float() + factors * (exact - empty.float()))
    unweighted = (weights == 1.0).all(dim=1)[:, None, None]
    return torch.where(unweighted, context, weighted.to(context.dtype))
