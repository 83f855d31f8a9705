"""A customisation as text asks for it, on a command line, in a file of requests or over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .concept import Concept
from .dci import DCI
from .ico import ICO
from .infusion import Infusion


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Names and numbers, no tensors; ``make`` gives the customisation.

    Attributes:
        concepts: files, or names that whoever reads them knows.
        foundation: Infusion's, "parallel" or "shared".
        concept_strength: Infusion's strength, one for all concepts or one each.
        dci: the placeholder of an ICO concept, or a noun, that gets two branches; None for none.
        auxiliary_noun, dci_strength, dci_fraction: DCI's.
    """

    concepts: Sequence[str] = ()
    foundation: str = "parallel"
    concept_strength: float | Sequence[float] = 1.0
    dci: str | None = None
    auxiliary_noun: str | None = None
    dci_strength: float = 1.0
    dci_fraction: float = 0.15

    def make(self, load: Callable[[str | Path], Concept] = Concept.load) -> Infusion | ICO | DCI | None:
        """The customisation; ``load`` reads a concept.

        Raises:
            ValueError: options belong to a method that is not asked for, or concepts are of two.
            ConceptFileError: a concept cannot be read.
        """
        if isinstance(self.concepts, str) or not isinstance(self.concepts, Sequence):
            raise ValueError(f"concepts must be a list, got {self.concepts!r}")
        concepts = [load(name) for name in self.concepts]
        method = _method(concepts)
        self._check_belonging(method)
        if method == "infusion":
            return Infusion(concepts, foundation=self.foundation, strength=self.concept_strength)
        if self.dci is not None:
            named = _named_first(concepts, self.dci) or self.dci
            return DCI(named, self.auxiliary_noun, strength=self.dci_strength, fraction=self.dci_fraction)
        return ICO(concepts) if concepts else None

    def _check_belonging(self, method: str | None) -> None:
        """Refuse options of a method that is not asked for."""
        for owner, is_asked, names in (
            ("Infusion concepts: give --concept too", method == "infusion", ("foundation", "concept_strength")),
            ("two branches: give --dci too", self.dci is not None, ("auxiliary_noun", "dci_strength", "dci_fraction")),
        ):
            for one in fields(self):
                value = getattr(self, one.name)
                if one.name in names and value != one.default and not is_asked:
                    raise ValueError(f"{one.name.replace('_', '-')} belongs to {owner}, got {value!r}")
        if method == "infusion" and self.dci is not None:
            raise ValueError(f"dci needs a noun alone or ICO concepts, got Infusion's {Path(self.concepts[0]).stem!r}")


def _method(concepts: Sequence[Concept]) -> str | None:
    """The one method of some concepts; None where there are none."""
    methods = sorted({concept.method for concept in concepts})
    if len(methods) > 1:
        raise ValueError(f"concept must be files of one method, got {' and '.join(methods)}")
    return methods[0] if methods else None


def _named_first(concepts: Sequence[Concept], placeholder: str) -> list[Concept]:
    """The concepts with the one that has the two branches in front; none where there are none."""
    named = [concept for concept in concepts if concept.placeholder == placeholder]
    if concepts and len(named) != 1:
        placeholders = ", ".join(concept.placeholder for concept in concepts)
        raise ValueError(f"dci must be the placeholder of one of the concepts ({placeholders}), got {placeholder!r}")
    return [*named, *(concept for concept in concepts if concept not in named)]


def take_asked(values: dict[str, Any]) -> Asked:
    """Take what an ``Asked`` has out of some named values, and leave the others."""
    names = [one.name for one in fields(Asked) if one.name in values]
    return Asked(**{name: values.pop(name) for name in names})
