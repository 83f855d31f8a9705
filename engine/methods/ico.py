"""Concepts with tokens, keys and values of their own (ICO, ECCV 2024, section 3.1): other text, never other weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .concept import Concept, check_concepts


@dataclass(frozen=True, slots=True)
class ICO:
    """Draw with concepts whose placeholders ("V*") stand in the prompts.

    Attributes:
        concepts: one or several, with placeholders of their own; their changes of keys and values add up, for the
            prompt and the negative prompt.
    """

    concepts: Sequence[Concept]

    def __post_init__(self) -> None:
        check_concepts("concepts", self.concepts, "ico")

    def settings(self) -> dict[str, Any]:
        """How a result describes it."""
        concepts = [
            {"name": concept.name, "noun": concept.noun, "placeholder": concept.placeholder}
            for concept in self.concepts
        ]
        return {"method": "ico", "concepts": concepts}
