"""Infusion: concepts as residual values under the foundation's attention maps (arXiv:2404.14007)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_number
from ..errors import ConceptFileError
from ..models.transformer import CrossAttention
from ..models.unet import UNet2DConditionModel
from ..text.encoder import Tokens
from ..text.words import find_noun
from .concept import Concept, check_concepts


@dataclass(frozen=True, slots=True)
class Infusion:
    """Draw with concepts: what is drawn changes, where it is drawn stays with the foundation.

    Attributes:
        concepts: one or several; their residuals add up, and their order does not matter.
        foundation: "parallel": the foundation draws its own picture from the same noise, and lends its maps on the
            way; "shared": it is evaluated at the customised latents of every step, which costs a row less and yields
            no picture.
        unconditional_maps: whether the customised unconditional row takes the maps of the foundation's ("foundation")
            or its own ("own"). The two are the same where the foundation is shared.
        tokens: whether a noun of several tokens is customised at its "last" one or at "all".
        occurrences: for each concept, which occurrence of its noun in the prompt it takes, from 0; None where the
            noun occurs once.
        strength: a factor on the residuals, one number or one per concept: 0 is the foundation, 1 what was trained.
    """

    concepts: Sequence[Concept]
    foundation: str = "parallel"
    unconditional_maps: str = "foundation"
    tokens: str = "last"
    occurrences: Sequence[int | None] | None = None
    strength: float | Sequence[float] = 1.0

    def settings(self) -> dict[str, Any]:
        """How a result describes it."""
        concepts = [{"name": concept.name, "noun": concept.noun, "space": concept.space} for concept in self.concepts]
        shared = {name: getattr(self, name) for name in ("foundation", "unconditional_maps", "tokens")}
        occurrences = None if self.occurrences is None else list(self.occurrences)
        return {
            "method": "infusion",
            "concepts": concepts,
            **shared,
            "occurrences": occurrences,
            "strength": list(self.strengths),
        }

    @property
    def strengths(self) -> tuple[float, ...]:
        """One per concept."""
        given = self.strength
        return tuple(given) if isinstance(given, list | tuple) else (given,) * len(self.concepts)  # type: ignore[return-value]

    def __post_init__(self) -> None:
        concepts = self.concepts
        check_concepts("concepts", concepts, "infusion")
        check_choice("foundation", self.foundation, ("parallel", "shared"))
        check_choice("unconditional_maps", self.unconditional_maps, ("foundation", "own"))
        check_choice("tokens", self.tokens, ("last", "all"))
        occurrences = self.occurrences
        if occurrences is not None and len(occurrences) != len(concepts):
            raise ValueError(f"occurrences must be one per concept ({len(concepts)}), got {len(occurrences)}")
        for value in occurrences or ():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ValueError(f"occurrences must hold integers >= 0 or None, got {value!r}")
        if len(self.strengths) != len(concepts):
            raise ValueError(f"strength must be one number or one per concept ({len(concepts)}), got {self.strength!r}")
        for value in self.strengths:
            check_number("strength", value, -1e6, 1e6)


def token_positions(text: Tokens, infusion: Infusion) -> dict[int, list[tuple[Concept, float]]]:
    """The concepts whose residual acts on a token, each with its strength, by the token's position in the encoder."""
    places: dict[int, list[tuple[Concept, float]]] = {}
    occurrences = infusion.occurrences or [None] * len(infusion.concepts)
    for concept, occurrence, strength in zip(infusion.concepts, occurrences, infusion.strengths, strict=True):
        positions = find_noun(text, concept.noun, occurrence)
        for position in positions if infusion.tokens == "all" else positions[-1:]:
            places.setdefault(position, []).append((concept, strength))
    return places


def residual_widths(unet: UNet2DConditionModel, space: str) -> dict[str, int]:
    """Length of each cross-attention layer's residual, in "text" or "value" space, in forward order."""
    layers = unet.cross_attentions.items()
    return {name: attn2.to_v.in_features if space == "text" else attn2.to_v.out_features for name, attn2 in layers}


def check_fit(concept: Concept, unet: UNet2DConditionModel) -> None:
    """Raise ``ConceptFileError`` unless the concept has one residual of the right width for every layer."""
    expected = residual_widths(unet, concept.space)
    where = f"concept {concept.name!r}"
    if missing := [name for name in expected if name not in concept.residuals]:
        raise ConceptFileError(
            f"{where}: this model has {len(expected)} cross-attention layers, the concept {len(concept.residuals)}; "
            f"missing {missing[0]}"
        )
    if extra := [name for name in concept.residuals if name not in expected]:
        raise ConceptFileError(f"{where}: this model has no cross-attention layer {extra[0]}")
    for name, width in expected.items():
        if len(concept.residuals[name]) != width:
            found = len(concept.residuals[name])
            raise ConceptFileError(f"{where}: {name}: this model's {concept.space} width is {width}, found {found}")


def project_residual(attn2: CrossAttention, residual: Tensor, space: str) -> Tensor:
    """``R[h] = W_O[:, h] r[h]``, with ``r = Delta W_V`` for a residual Delta in text space; float32, differentiable.

    Args:
        attn2: the layer.
        residual: (E,) in text space, (C,) in value space.
        space: "text" or "value".

    Returns:
        (H, C): what the layer's output gains where a head's map is 1.
    """
    weight: Tensor = attn2.to_out[0].weight  # pyright: ignore[reportAssignmentType]
    weight = weight.float().unflatten(1, (attn2.n_heads, -1))  # (C, H, D)
    value = attn2.to_v.weight.float() @ residual if space == "text" else residual
    return torch.einsum("chd,hd->hc", weight, value.unflatten(0, (attn2.n_heads, -1)))


@torch.no_grad()
def project(concept: Concept, unet: UNet2DConditionModel) -> tuple[Tensor, ...]:
    """Per cross-attention layer, the projected residual (H, C), in the weights' device and dtype.

    Raises:
        ConceptFileError: the concept does not fit.
    """
    check_fit(concept, unet)
    like = unet.conv_in.weight
    return tuple(
        project_residual(attn2, concept.residuals[name].to(like.device, torch.float32), concept.space).to(like.dtype)
        for name, attn2 in unet.cross_attentions.items()
    )
