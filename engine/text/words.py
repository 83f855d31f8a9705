"""Where words stand in a tokenized prompt."""

from __future__ import annotations

import re

from .encoder import Tokens


def word_pattern(words: str) -> str:
    """A regular expression for a word or words, not within others."""
    return rf"(?<!\w){re.escape(words)}(?!\w)"


def find_noun(text: Tokens, noun: str, occurrence: int | None = None) -> list[int]:
    """Positions of the tokens of a word or words in a tokenized prompt; see ``Tokens.positions``.

    Raises:
        ValueError: it is absent, is there more than once and no occurrence is given, or does not fit.
    """
    return find_phrase(text, word_pattern(noun), noun, occurrence)


def find_phrase(text: Tokens, pattern: str, name: str, occurrence: int | None = None) -> list[int]:
    """The same for what a regular expression matches, which messages call ``name``."""
    found = list(re.finditer(pattern, text.text, re.IGNORECASE))
    if not found:
        raise ValueError(f"the prompt must contain {name!r}, got {text.text!r}")
    if occurrence is None and len(found) > 1:
        rule = f"the prompt has {name!r} {len(found)} times; say which with occurrences"
        raise ValueError(f"{rule}, got {text.text!r}")
    if occurrence is not None and occurrence >= len(found):
        raise ValueError(f"the prompt has {name!r} {len(found)} times, got occurrence {occurrence}")
    start, end = found[occurrence or 0].span()
    last = max((stop for _, stop in text.spans), default=0)
    if end > last:
        rule = f"{name!r} must be within the text encoder's {len(text.ids)} tokens"
        raise ValueError(f"{rule}; it was cut off from {text.text!r}")
    spans = zip(text.positions, text.spans, strict=True)
    return [position for position, (first, stop) in spans if first < end and stop > start]
