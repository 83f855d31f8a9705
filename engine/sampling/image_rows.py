"""Image prompts in the rows of a batch: who attends to which pictures, as tensors of one shape for all rows.

A row without a picture has values of zero. Rows whose prompts have different numbers of tokens have them repeated, all
alike, up to a common multiple: a softmax over k copies of some keys weights each copy with a k-th, so that attention is
what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import lcm

import torch
from torch import Tensor

from ..methods.image_prompt import ImagePrompt
from ..models.conditioning import Batch, TextKV
from ..models.unet import UNet2DConditionModel
from .layout import Layout

Sees = tuple[tuple[ImagePrompt, ...], bool]  # the prompts of a row, and whether guidance goes towards them


class ProjectedImages:
    """The image prompts of one request: each is projected once, whichever rows and phases attend to it."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet = unet
        self._known: dict[tuple[ImagePrompt, bool], TextKV] = {}

    def rows(self, layout: Layout) -> TextKV | None:
        """Per cross-attention layer, keys and values (K, O, S, C) of the map-owning rows; None where none has any."""
        if not any(layout.request.image_prompts):
            return None
        rows = [[self._projected(prompt, towards) for prompt in prompts] for prompts, towards in seen_by_rows(layout)]
        n_tokens = lcm(*(len(prompt[0][0]) for row in rows for prompt in row))
        shape, like = (max(map(len, rows)), len(rows), n_tokens), self.unet.conv_in.weight
        layers = []
        for layer, attn2 in enumerate(self.unet.cross_attentions.values()):
            both = like.new_zeros(2, *shape, attn2.to_k.out_features)
            for i, row in enumerate(rows):
                for k, prompt in enumerate(row):
                    for target, part in zip(both, prompt[layer], strict=True):
                        target[k, i] = part.repeat(n_tokens // len(part), 1)
            layers.append((both[0], both[1]))
        return tuple(layers)

    def _projected(self, prompt: ImagePrompt, towards: bool) -> TextKV:
        if (prompt, towards) not in self._known:
            prompt.adapter.check_fit(self.unet)
            tokens = prompt.tokens if towards else prompt.adapter.no_picture
            self._known[prompt, towards] = prompt.adapter.keys_and_values(tokens, prompt.scale)
        return self._known[prompt, towards]


def seen_by_rows(layout: Layout) -> list[Sees]:
    """For each map-owning row its image's prompts, and whether it is one that guidance goes towards or away from."""
    prompts = layout.request.image_prompts
    away = {layout.number(row) for row, other in layout.guided if row != other}
    images = layout.images
    return [(prompts[images[owner.trajectory]], number not in away) for number, owner in enumerate(layout.all_owners)]


def join_images(
    batches: Sequence[Batch], n_owners: Sequence[int], owners: Tensor, size: Callable[[int], int]
) -> TextKV | None:
    """The keys and values of the joined batch's map-owning rows; None where no batch has any.

    Args:
        batches: what is joined.
        n_owners: how many map-owning rows each has.
        owners: (O,) int64, for each map-owning row of the joined batch its number among all of ``batches``.
        size: what the number of a row's prompts is filled up to.
    """
    there = [batch.images for batch in batches if batch.images is not None]
    if not there:
        return None
    n_sets, n_tokens = size(max(len(one[0][0]) for one in there)), lcm(*(one[0][0].shape[2] for one in there))

    def filled(part: Tensor | None, like: Tensor, n_rows: int) -> Tensor:
        out = like.new_zeros(n_sets, n_rows, n_tokens, like.shape[-1])
        if part is not None:
            out[: len(part)] = part.repeat(1, 1, n_tokens // part.shape[2], 1)
        return out

    def joined(layer: int, k: int) -> Tensor:
        parts = [None if batch.images is None else batch.images[layer][k] for batch in batches]
        like = there[0][layer][k]
        return torch.cat([filled(part, like, n) for part, n in zip(parts, n_owners, strict=True)], dim=1)[:, owners]

    return tuple((joined(layer, 0), joined(layer, 1)) for layer in range(len(there[0])))
