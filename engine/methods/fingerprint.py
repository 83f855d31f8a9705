"""Numbers that tell base models apart, so that a concept can say which one it was trained on."""

from __future__ import annotations

import torch

from ..errors import ConceptFileError
from ..models.unet import UNet2DConditionModel
from ..warn import warn
from .concept import Concept

_SAME_BASE = 0.05  # fine-tunes stay below, and so do roundings to any dtype


def fingerprint(unet: UNet2DConditionModel) -> tuple[float, ...]:
    """What tells base models apart, in any dtype: one random projection of each layer's normalised value weights.

    Two unrelated models differ by about 1 in every number; weights that differ by a relative d differ by about d.
    """
    numbers = []
    for attn2 in unet.cross_attentions.values():
        weight = attn2.to_v.weight.detach().cpu().double()
        pattern = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        numbers.append(round(float((weight * pattern).sum() / weight.norm()), 4))
    return tuple(numbers)


def check_base(concept: Concept, base: tuple[float, ...]) -> None:
    """Warn if a concept was trained on a model of another fingerprint; one of another length is an error."""
    if concept.base and len(concept.base) != len(base):
        found = f"base must have {len(base)} numbers here, found {len(concept.base)}"
        raise ConceptFileError(f"concept {concept.name!r}: {found}")
    if concept.base and max(abs(a - b) for a, b in zip(concept.base, base, strict=True)) > _SAME_BASE:
        warn(f"concept {concept.name!r} was trained on another model; it may mean nothing to this one")
