"""Concepts with tokens, keys and values of their own (ICO, ECCV 2024, section 3.1): other text, never other weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .concept import Change, Concept
from .errors import ConceptFileError
from .infusion import warn_of_other_base
from .text import Text, TextEncoder
from .unet import UNet2DConditionModel

Changes = Mapping[str, Change]
TextKV = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True, slots=True)
class ICO:
    """Draw with concepts whose placeholders ("V*") stand in the prompts.

    Attributes:
        concepts: one or several, with placeholders of their own; their changes of keys and values add up, for the
            prompt and the negative prompt.
    """

    concepts: Sequence[Concept]

    def __post_init__(self) -> None:
        check_tuned("concepts", self.concepts)

    def settings(self) -> dict[str, Any]:
        """How a result describes it."""
        concepts = [
            {"name": concept.name, "noun": concept.noun, "placeholder": concept.placeholder}
            for concept in self.concepts
        ]
        return {"method": "ico", "concepts": concepts}


def check_tuned(name: str, concepts: Any) -> None:
    """Raise ``ValueError`` unless these are concepts with tokens or changes."""
    if not isinstance(concepts, list | tuple) or not concepts or not all(isinstance(c, Concept) for c in concepts):
        raise ValueError(f"{name} must be at least one engine.Concept, got {concepts!r}")
    for concept in concepts:
        if concept.method != "ico":
            raise ValueError(
                f"{name} must have tokens or changes of keys and values; use engine.Infusion for "
                f"residuals, got {concept.name!r}"
            )


def encode_texts(
    texts: Sequence[Text],
    text_encoder: TextEncoder,
    unet: UNet2DConditionModel,
    changes_of: Callable[[Concept], Changes],
) -> TextKV:
    """Per cross-attention layer, keys and values (B, S, C) of texts, with what their concepts change.

    ``K = W_K c + sum_s dW_K,s c`` for the encoded text c, and so for V.
    """
    context = text_encoder.encode([text_encoder.tokenize(text.prompt, text.concepts) for text in texts])
    projected = unet.text_kv(context)
    context = context.to(unet.conv_in.weight.dtype)
    for i, text in enumerate(texts):
        for concept in text.concepts:
            changes = changes_of(concept)
            for layer, (keys, values) in zip(unet.cross_attentions, projected, strict=True):
                for projection, rows in (("to_k", keys), ("to_v", values)):
                    if (change := changes.get(f"{layer}.{projection}")) is not None:
                        rows[i] += change(context[i])
    return projected


def fit_changes(concept: Concept, unet: UNet2DConditionModel, base: tuple[float, ...]) -> dict[str, Change]:
    """The concept's changes in the weights' device and dtype.

    Raises:
        ConceptFileError: they do not fit the model. Ones of another model of the same sizes, told by its fingerprint
            ``base``, are used with a warning.
    """
    expected = {
        f"{name}.{projection}": tuple(getattr(attn2, projection).weight.shape)
        for name, attn2 in unet.cross_attentions.items()
        for projection in ("to_k", "to_v")
    }
    for name, change in concept.changes.items():
        if name not in expected:
            raise ConceptFileError(f"concept {concept.name!r}: this model has no cross-attention projection {name}")
        if change.shape != expected[name]:
            rule = f"concept {concept.name!r}: {name}: this model's is {expected[name]}"
            raise ConceptFileError(f"{rule}, found {change.shape}")
    warn_of_other_base(concept, base)
    weight = unet.conv_in.weight
    return {name: change.to(weight.device, weight.dtype) for name, change in concept.changes.items()}
