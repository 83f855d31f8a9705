"""Texts of different lengths in one batch: how their keys are made as many, and what that changes.

A softmax over keys K that are repeated k times, with their values V, is that over K: ``softmax(q [K; K]^T) [V; V] =
softmax(q K^T) V``. So a row of 77 keys joins one of 154 exactly. Each key's share of the map becomes 1/k, which what
acts on single keys makes up for: residuals at a token count k times, and so does the temperature by which DCI sharpens
the map among a prompt's own tokens; only the first of a token's k keys is followed, or chosen for a mask.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from ..methods.concept_cache import Texts
from ..methods.dci import DCI
from ..methods.ico import ICO
from ..models.conditioning import TextKV
from ..text.encoder import Tokens
from .layout import Layout, Owner

if TYPE_CHECKING:
    from .plan import GuidedBatch

_JOINING = (1, 2, 4)  # chunks of texts that share a scheduler's batches; others would make rows far longer than any is


def fill_chunks(layouts: Iterable[Layout], texts: Texts) -> None:
    """Give all texts of an image as many chunks as the longest of them has, of every phase.

    What else is in the request plays no part, so that a picture does not depend on it.
    """
    owners = [(layout, owner) for layout in layouts for owner in layout.all_owners]
    if all(len(texts.tokens(owner.text).sizes) == 1 for _, owner in owners):
        return
    chunks = defaultdict[Hashable, int](int)
    for layout, owner in owners:
        image = _image(layout, owner)
        chunks[image] = max(chunks[image], len(texts.tokens(owner.text).sizes))
    for layout in layouts:
        for segment, own in layout.owners.items():
            layout.owners[segment] = [
                replace(owner, text=replace(owner.text, chunks=chunks[_image(layout, owner)])) for owner in own
            ]


def _image(layout: Layout, owner: Owner) -> Hashable:
    """Images with the same texts are as one, as their trajectories may be; each DCI has branches of its own."""
    i = layout.images[owner.trajectory]
    custom = layout.request.customizations[i]
    concepts = tuple(custom.concepts) if isinstance(custom, ICO) else ()
    return i if isinstance(custom, DCI) else (layout.written.prompts[i], layout.written.negative_prompts[i], concepts)


def chunk_kind(layout: Layout) -> int:
    """What must be alike in requests that share a scheduler's batches: their chunks, where these join few others."""
    chunks = math.lcm(*(len(layout.known.tokens(owner.text).sizes) for owner in layout.all_owners))
    return max(_JOINING) if chunks in _JOINING else chunks


def own_first(tokens: Tokens) -> list[int]:
    """An order of a prompt's keys that has its own tokens behind the first begin token, chunk by chunk."""
    own = set(tokens.positions)
    return [0, *tokens.positions, *(i for i in range(1, len(tokens.ids)) if i not in own)]


def with_common_keys(batches: Sequence[GuidedBatch]) -> list[GuidedBatch]:
    """The same batches with as many keys each, the least common multiple of theirs."""
    counts = [_n_keys(one) for one in batches]
    n_keys = math.lcm(*counts)
    return [one if own == n_keys else _repeated(one, n_keys // own) for one, own in zip(batches, counts, strict=True)]


def _n_keys(rows: GuidedBatch) -> int:
    return rows.batch.text[0][0].shape[1]


def _repeated(rows: GuidedBatch, times: int) -> GuidedBatch:
    batch = rows.batch
    following, mixing = batch.following, batch.mixing
    if following is not None:
        following = replace(following, residuals=tuple(times * layer for layer in following.residuals))
    if mixing is not None:
        n_more = (times - 1) * mixing.chosen.shape[1]
        mixing = replace(mixing, chosen=F.pad(mixing.chosen, (0, n_more)), gates=repeated_gates(mixing.gates, times))
    text = _tiled(batch.text, times)
    nets = tuple(replace(one, batch=replace(one.batch, text=_tiled(one.batch.text, times))) for one in rows.nets)
    return replace(rows, batch=replace(batch, text=text, following=following, mixing=mixing), nets=nets)


def _tiled(text: TextKV, times: int) -> TextKV:
    return tuple((keys.repeat(1, times, 1), values.repeat(1, times, 1)) for keys, values in text)


def repeated_gates(gates: Tensor, times: int | Tensor) -> Tensor:
    """DCI's gates (M, 4) for keys that are repeated: tau_t sharpens a map whose entries are ``times`` smaller."""
    gates = gates.clone()
    gates[:, 1] *= times
    return gates
