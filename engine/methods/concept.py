"""Concepts: what a customisation has learned, all of it data on the text side of cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice, check_integer
from ..errors import ConceptFileError
from .concept_file import read_concept, write_concept

_SPACES, _DTYPES = ("text", "value"), ("float16", "int8")


@dataclass(frozen=True, eq=False)
class Change:
    """A change of one linear projection of the text, as a matrix or as two factors.

    Attributes:
        up: (C, E), or (C, r) where ``down`` is given.
        down: (r, E), or None.
    """

    up: Tensor
    down: Tensor | None = None

    def __call__(self, context: Tensor) -> Tensor:
        """What encoded text (..., E) gains, (..., C)."""
        return F.linear(context if self.down is None else F.linear(context, self.down), self.up)

    @property
    def shape(self) -> tuple[int, int]:
        """(C, E)."""
        return self.up.shape[0], (self.up if self.down is None else self.down).shape[1]

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return (self.up,) if self.down is None else (self.up, self.down)

    def matrix(self) -> Tensor:
        """(C, E) float32."""
        return self.up.float() if self.down is None else self.up.float() @ self.down.float()

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Change:
        return Change(*(factor.to(device, dtype) for factor in self.factors))

    def compressed(self, rank: int) -> tuple[Change, float]:
        """The closest change of a rank (Eckart and Young 1936), and the squared norm of what is lost."""
        u, s, v = torch.linalg.svd(self.matrix(), full_matrices=False)
        root = s[:rank].sqrt()
        return Change(u[:, :rank] * root, root[:, None] * v[:rank]), float(s[rank:].square().sum())


@dataclass(frozen=True, eq=False)
class Concept:
    """A learned concept: either residuals (Infusion), or tokens and changes of the text's projections (ICO).

    Attributes:
        noun: the class noun it customises, as prompts spell it; may be "" for tokens alone.
        residuals: per cross-attention layer, by the layer's name in the UNet, one vector: in text space (E,), added
            to the noun's encoding before the value projection; in value space (C,), after it.
        space: "text" or "value", where residuals act.
        base: fingerprint of the model it was trained on; see ``infusion.fingerprint``. Empty where unknown.
        training: how it was made, JSON-serialisable.
        name: for messages; a file's stem.
        tokens: (S, E) token embeddings that ``placeholder`` stands for in a prompt; None for none.
        placeholder: what prompts write for the tokens.
        changes: by "<layer>.to_k" and "<layer>.to_v", what is added to these projections of the text.
    """

    noun: str
    residuals: Mapping[str, Tensor] = field(default_factory=dict)
    space: str = "text"
    base: tuple[float, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    tokens: Tensor | None = None
    placeholder: str = "V*"
    changes: Mapping[str, Change] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.noun, str) or not (self.noun.strip() or self.tokens is not None):
            raise ValueError(f"noun must be a word or words, got {self.noun!r}")
        check_choice("space", self.space, _SPACES)
        tuned = self.tokens is not None or bool(self.changes)
        if not isinstance(self.residuals, Mapping) or not (self.residuals or tuned):
            raise ValueError(f"residuals must map layer names to vectors, got {self.residuals!r}")
        if self.residuals and tuned:
            raise ValueError("a concept must have residuals, or tokens and changes, got both")
        for layer, residual in self.residuals.items():
            _check_tensor("residuals", residual, 1, layer)
        if self.tokens is not None:
            _check_tensor("tokens", self.tokens, 2, self.placeholder)
        if not isinstance(self.placeholder, str) or not self.placeholder or any(map(str.isspace, self.placeholder)):
            raise ValueError(f"placeholder must be a text without spaces, got {self.placeholder!r}")
        for name, change in self.changes.items():
            for factor in change.factors:
                _check_tensor("changes", factor, 2, name)
            if change.down is not None and change.up.shape[1] != change.down.shape[0]:
                shapes = f"{tuple(change.up.shape)} and {tuple(change.down.shape)}"
                raise ValueError(f"changes must be (C, E), or (C, r) and (r, E), got {shapes} for {name!r}")
        if not self.name:
            object.__setattr__(self, "name", self.noun or self.placeholder)

    def tensors(self) -> list[tuple[str, Tensor]]:
        """All that was learned, with a name each."""
        tokens = [] if self.tokens is None else [("tokens", self.tokens)]
        changes = [(name, factor) for name, change in self.changes.items() for factor in change.factors]
        return [*self.residuals.items(), *tokens, *changes]

    @property
    def method(self) -> str:
        """ "infusion" or "ico"."""
        return "infusion" if self.residuals else "ico"

    def compressed(self, rank: int) -> Concept:
        """The concept with every change as two factors; ``training`` says what share of the changes' norm is lost."""
        check_integer("rank", rank, 1)
        if not self.changes:
            raise ValueError(f"rank belongs to changes of keys and values, which concept {self.name!r} has none of")
        parts = {name: change.compressed(rank) for name, change in self.changes.items()}
        whole = sum(float(change.matrix().square().sum()) for change in self.changes.values())
        lost = (sum(lost for _, lost in parts.values()) / whole) ** 0.5 if whole else 0.0
        training = {**self.training, "rank": rank, "compression_error": round(lost, 6)}
        return replace(self, changes={name: change for name, (change, _) in parts.items()}, training=training)

    def save(self, path: str | Path, dtype: str = "float16", rank: int | None = None) -> None:
        """Write the concept; an existing file is replaced in one step, or not at all.

        Args:
            path: usually ends in ``.safetensors``.
            dtype: "float16", or for residuals "int8" with one scale per layer (about half the size).
            rank: store changes of keys and values as factors of this rank; see ``compressed``.

        Raises:
            ValueError: a number exceeds float16's range.
        """
        concept = self if rank is None else self.compressed(rank)
        own = (
            {"residuals": concept.residuals, "space": concept.space}
            if concept.method == "infusion"
            else {
                "tokens": concept.tokens,
                "placeholder": concept.placeholder,
                "changes": {name: change.factors for name, change in concept.changes.items()},
            }
        )
        shared = {"noun": concept.noun, "base": concept.base, "training": dict(concept.training)}
        write_concept(Path(path), concept.method, {**shared, **own}, check_choice("dtype", dtype, _DTYPES))

    @classmethod
    def load(cls, path: str | Path) -> Concept:
        """Read a concept file.

        Raises:
            ConceptFileError: it is not one, is damaged, or holds what a concept cannot; the message names the file.
        """
        path = Path(path)
        fields = read_concept(path)
        if "changes" in fields:
            fields["changes"] = {name: Change(*factors) for name, factors in fields["changes"].items()}
        try:
            return cls(**fields, name=path.stem)
        except ValueError as error:
            raise ConceptFileError(f"{path}: {error}") from error


_USES = {
    "infusion": "must have residuals; use engine.ICO or engine.DCI for tokens, keys and values",
    "ico": "must have tokens or changes of keys and values; use engine.Infusion for residuals",
}


def check_concepts(name: str, concepts: Any, method: str) -> None:
    """Raise ``ValueError`` unless these are one or more concepts of a method."""
    if not isinstance(concepts, list | tuple) or not concepts or not all(isinstance(c, Concept) for c in concepts):
        raise ValueError(f"{name} must be a list of at least one engine.Concept, got {concepts!r}")
    for concept in concepts:
        if concept.method != method:
            raise ValueError(f"{name} {_USES[method]}, got {concept.name!r}")


def _check_tensor(name: str, value: Any, ndim: int, where: str) -> None:
    if not isinstance(value, Tensor) or value.ndim != ndim or not value.is_floating_point() or not value.numel():
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        kind = "vectors" if ndim == 1 else "matrices"
        raise ValueError(f"{name} must be floating-point {kind}, got {found} for {where!r}")
    if not torch.isfinite(value).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity for {where!r}")
