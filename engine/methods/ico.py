"""Concepts with tokens, keys and values of their own (ICO, ECCV 2024, section 3.1): other text, never other weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import ConceptFileError
from ..models.unet import UNet2DConditionModel
from ..text.encoder import Text, TextEncoder
from .concept import Change, Concept, check_concepts
from .infusion import check_base

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
        check_concepts("concepts", self.concepts, "ico")

    def settings(self) -> dict[str, Any]:
        """How a result describes it."""
        concepts = [
            {"name": concept.name, "noun": concept.noun, "placeholder": concept.placeholder}
            for concept in self.concepts
        ]
        return {"method": "ico", "concepts": concepts}


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
    rows = dict(zip(unet.text_projections, (tensor for pair in projected for tensor in pair), strict=True))
    for i, text in enumerate(texts):
        for concept in text.concepts:
            for name, change in changes_of(concept).items():
                rows[name][i] += change(context[i])
    return projected


def fit_changes(concept: Concept, unet: UNet2DConditionModel, base: tuple[float, ...]) -> dict[str, Change]:
    """The concept's changes in the weights' device and dtype.

    Raises:
        ConceptFileError: they do not fit the model. Ones of another model of the same sizes, told by its fingerprint
            ``base``, are used with a warning.
    """
    for name, change in concept.changes.items():
        if name not in unet.text_projections:
            raise ConceptFileError(f"concept {concept.name!r}: this model has no cross-attention projection {name}")
        expected = tuple(unet.text_projections[name].weight.shape)
        if change.shape != expected:
            rule = f"concept {concept.name!r}: {name}: this model's is {expected}"
            raise ConceptFileError(f"{rule}, found {change.shape}")
    check_base(concept, base)
    weight = unet.conv_in.weight
    return {name: change.to(weight.device, weight.dtype) for name, change in concept.changes.items()}
