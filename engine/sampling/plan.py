"""From a request to tensors: the rows of every phase, what they attend to, and how guidance combines them.

A plan is data: a customisation changes indices and values, never code. Auxiliary branches leave after their steps and
prompts may change over the steps, so a request has a plan per phase.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ..methods.concept_cache import ConceptCache, Text, Texts
from ..methods.dci import DCI
from ..methods.infusion import Infusion
from ..models.conditioning import Batch, Following, Mixing, Shared, TextKV
from ..observe.word_maps import Watched
from ..text.editing import texts_over_steps
from .control import NetPlanner, NetRows, acting, control_ends
from .image_rows import ProjectedImages
from .keys import fill_chunks, own_first, repeated_gates
from .layout import AUXILIARY, CONCEPT, Layout
from .request import Request


@dataclass(frozen=True, slots=True)
class GuidedBatch:
    """R rows for P trajectories, the same at every step of a phase; indices are int64 tensors.

    Attributes:
        batch: what the rows attend to.
        trajectories: (R,) the trajectory whose latents each row sees.
        unconditional, conditional: (P,) the two rows that guidance combines; one row twice where it is off.
        guidance_scale: (P, 1, 1, 1) float32.
        guidance_rescale: likewise; None where it is 0 for all.
        nets: the ControlNets that act upon some of the rows.
    """

    batch: Batch
    trajectories: Tensor
    unconditional: Tensor
    conditional: Tensor
    guidance_scale: Tensor
    guidance_rescale: Tensor | None = None
    nets: tuple[NetRows, ...] = ()

    @property
    def n_rows(self) -> tuple[int, int]:
        """Of the UNet, and of all ControlNets together."""
        return len(self.trajectories), sum(len(one.rows) for one in self.nets)


@dataclass(frozen=True, slots=True)
class RowPlan:
    """The steps of one phase, for P trajectories of I images.

    Attributes:
        rows: who is evaluated.
        steps: how many steps this plan is for.
        inherits: (P,) the trajectory of the plan before that each trajectory goes on from.
        starts: (P,) the start and step noise each trajectory takes: an image's, or I + i for the independent noise of
            image i's auxiliary branch.
        mixed_images: the image of each mixing pair.
        watched: for each image its map-owning row, and the slots of each attention word's tokens among the columns.
        pictures: (I,) each image's own trajectory.
        foundations: each image's foundation trajectory, None where it has none.
    """

    rows: GuidedBatch
    steps: int
    inherits: Tensor
    starts: Tensor
    mixed_images: tuple[int, ...]
    watched: tuple[Watched, ...]
    pictures: Tensor
    foundations: tuple[int | None, ...]


def make_plans(
    request: Request, steps: int, texts: Texts, concepts: ConceptCache, device: torch.device
) -> list[RowPlan]:
    """Lay out the rows of a request.

    Args:
        request: what to draw.
        steps: how many evaluations the sampler's table has.
        texts: tokenizes and encodes prompts, each once for all phases.
        concepts: what concepts become on the model.
        device: where the plans' tensors go.

    Returns:
        One plan per phase; a phase ends where an auxiliary branch does, a ControlNet comes or leaves, or a prompt
        changes. Those that differ in nothing share their rows.

    Raises:
        ValueError: a customised noun is absent from its prompt, ambiguous or cut off; a ControlNet is of another model.
        NonFiniteError: the text encoder produced NaN or infinity.
    """
    phases = lay_out(request, steps, texts)
    known = list(dict.fromkeys(owner.text for _, layout in phases for owner in layout.all_owners))
    context = texts.encode(known, request.options.weighting)
    text_kv = concepts.text_kv(known, context)
    nets = NetPlanner(request, known, context, concepts.unet)
    images, planners = ProjectedImages(concepts.unet), dict[Layout, _Planner]()
    for layout in dict.fromkeys(layout for _, layout in phases):
        planners[layout] = _Planner(layout, concepts, device, known, text_kv, images.rows(layout), nets.rows(layout))
    plans, before = [], phases[0][1]
    for n_steps, layout in phases:
        plans.append(planners[layout].plan(n_steps, list(before.trajectories)))
        before = layout
    return plans


def lay_out(request: Request, steps: int, texts: Texts) -> list[tuple[int, Layout]]:
    """The layout of each phase, and for how many of the ``steps`` evaluations; raises as ``make_plans`` does.

    Shares of the steps, by which prompts change, are of the whole schedule, also where a picture begins within it.
    """
    asked = request.options.steps
    total = steps * asked // (asked - request.begin)
    written = (*request.prompts, *request.negative_prompts)
    changing = {prompt: texts_over_steps(prompt, total, steps) for prompt in written}
    ends = {custom.mixing_steps(steps) for custom in request.customizations if isinstance(custom, DCI)}
    starts = {start for runs in changing.values() for start, _ in runs} | control_ends(request, steps)
    phases, known = [], {}
    for first, last in pairwise(sorted({0, steps} | ends | starts)):
        now = replace(
            request,
            prompts=tuple(_text_at(changing[prompt], first) for prompt in request.prompts),
            negative_prompts=tuple(_text_at(changing[prompt], first) for prompt in request.negative_prompts),
        )
        controls = acting(request, first, steps)
        key = now.prompts, now.negative_prompts, tuple(first < end for end in ends), controls
        if key not in known:
            layout = known[key] = Layout(now, texts, request, controls)
            for i, custom in enumerate(request.customizations):
                if isinstance(custom, Infusion):
                    layout.add_infusion(i, custom)
                elif isinstance(custom, DCI):
                    layout.add_dci(i, custom, mixes=first < custom.mixing_steps(steps))
                else:
                    layout.add_plain(i, () if custom is None else tuple(custom.concepts))
        phases.append((last - first, known[key]))
    fill_chunks(known.values(), texts)
    return phases


def _text_at(runs: Sequence[tuple[int, str]], step: int) -> str:
    return next(text for start, text in reversed(runs) if start <= step)


class _Planner:
    """Makes tensors of a layout.

    Args:
        layout: who is in the batch.
        concepts: what concepts become on the model.
        device: where tensors go.
        known: the texts of the request.
        text_kv: their keys and values, as many for each; see ``keys.py`` for those of shorter texts.
        images: keys and values of the rows' image prompts; see ``image_rows.py``.
        nets: the ControlNets that act upon it.
    """

    def __init__(
        self,
        layout: Layout,
        concepts: ConceptCache,
        device: torch.device,
        known: Sequence[Text],
        text_kv: TextKV,
        images: TextKV | None,
        nets: tuple[NetRows, ...],
    ) -> None:
        self.layout, self.concepts, self.device = layout, concepts, device
        self.images, self.nets = images, nets
        self.known, self.text_kv = known, text_kv
        self.slots = layout.slots()
        self.tokens = [layout.known.tokens(owner.text) for owner in layout.all_owners]
        self.n_keys = text_kv[0][0].shape[1]
        mixing = [layout.number((segment, i)) for segment in (CONCEPT, AUXILIARY) for i in range(len(layout.pairs))]
        # a mask is of the keys 1..n, among which further chunks have end and begin tokens
        self.orders = {row: own_first(self.tokens[row]) for row in mixing if len(self.tokens[row].sizes) > 1}
        self.rows = self._rows()  # of every phase that has this layout

    def plan(self, steps: int, before: Sequence[object]) -> RowPlan:
        """A plan for ``steps`` steps, which go on from trajectories that were in the order ``before``."""
        layout, slots = self.layout, self.slots
        owners = [layout.number(drawn.owner) for drawn in layout.drawn]
        words = [drawn.words for drawn in layout.drawn]
        return RowPlan(
            rows=self.rows,
            steps=steps,
            inherits=self._index([before.index(key) for key in layout.trajectories]),
            starts=self._index(list(layout.trajectories.values())),
            mixed_images=tuple(pair.image for pair in layout.pairs),
            watched=tuple(
                (row, [[slots[row].index(position) for position in word] * self._times(row) for word in own])
                for row, own in zip(owners, words, strict=True)
            ),
            pictures=self._index([drawn.trajectory for drawn in layout.drawn]),
            foundations=tuple(drawn.foundation for drawn in layout.drawn),
        )

    def _times(self, row: int) -> int:
        """How often the keys of a map-owning row are repeated; each column is so much smaller."""
        return self.n_keys // len(self.tokens[row].ids)

    def _place(self, row: int, position: int) -> int:
        """Where the key of a token is, among a row's keys."""
        return self.orders[row].index(position) if row in self.orders else position

    def _rows(self) -> GuidedBatch:
        layout, text_kv = self.layout, self.text_kv
        trajectories = [row.trajectory for row in (*layout.all_owners, *layout.followers)]
        firsts = [trajectories.index(trajectory) for trajectory in range(len(layout.trajectories))]
        columns_wanted = layout.followers or layout.request.options.attention_words
        index = self._index([self.known.index(owner.text) for owner in layout.all_owners])
        rescale = layout.request.options.guidance_rescale
        scale = torch.full((len(layout.guided), 1, 1, 1), layout.request.options.guidance_scale, device=self.device)
        batch = Batch(
            text=tuple((self._ordered(keys[index]), self._ordered(values[index])) for keys, values in text_kv),
            following=self._following() if columns_wanted else None,
            mixing=self._mixing(len(text_kv)) if layout.pairs else None,
            shared=Shared(self._index(trajectories), self._index(firsts)) if len(firsts) < len(trajectories) else None,
            images=self.images,
        )
        return GuidedBatch(
            batch=batch,
            trajectories=self._index(trajectories),
            unconditional=self._index([layout.number(row) for row, _ in layout.guided]),
            conditional=self._index([layout.number(row) for _, row in layout.guided]),
            guidance_scale=scale,
            guidance_rescale=torch.full_like(scale, rescale) if rescale else None,
            nets=self.nets,
        )

    def _ordered(self, rows: Tensor) -> Tensor:
        """Keys or values (B - F, S, C) of the rows, in their orders."""
        for row, order in self.orders.items():
            rows[row, : len(order)] = rows[row, order]
        return rows

    def _following(self) -> Following:
        """Each follower's residual values, in its leader's slots; those of other tokens stay zero."""
        leaders = [self.layout.number(follower.leader) for follower in self.layout.followers]
        values = self._no_residuals(len(leaders))
        for number, (leader, follower) in enumerate(zip(leaders, self.layout.followers, strict=True)):
            for position, concepts in follower.residuals.items():
                slot = self.slots[leader].index(position)
                for concept, strength in concepts:
                    factor = strength * self._times(leader)
                    for value, residual in zip(values, self.concepts.residuals(concept), strict=True):
                        value[number, slot] += factor * residual
        residuals = tuple(value.flatten(1, 2) for value in values)
        tokens = [[self._place(row, position) for position in own] for row, own in enumerate(self.slots)]
        return Following(tokens=self._index(tokens), leaders=self._index(leaders), residuals=residuals)

    def _no_residuals(self, n_followers: int) -> list[Tensor]:
        """Per cross-attention layer zeros (F, slots, H, C); none where nobody follows."""
        if not n_followers:
            return []
        layers = self.concepts.unet.cross_attentions.values()
        shapes = [(n_followers, len(self.slots[0]), attn2.n_heads, attn2.to_q.out_features) for attn2 in layers]
        return [attn2.to_q.weight.new_zeros(shape) for attn2, shape in zip(layers, shapes, strict=True)]

    def _mixing(self, n_layers: int) -> Mixing:
        """The pairs' masks and gates."""
        layout, pairs = self.layout, self.layout.pairs
        first = pairs[0].dci
        branches = [pair.branches for pair in pairs]
        chosen = torch.zeros(2 * len(pairs), self.n_keys, dtype=torch.bool)
        for k, segment in enumerate((CONCEPT, AUXILIARY)):
            for number, one in enumerate(branches):
                row = layout.number((segment, number))
                chosen[k * len(pairs) + number, [self._place(row, position) for position in one.chosen[k]]] = True
        gates = torch.tensor([(pair.dci.strength, *pair.dci.scales) for pair in pairs], dtype=torch.float32)
        times = torch.tensor([self._times(layout.number((CONCEPT, number))) for number in range(len(pairs))])
        return Mixing(
            chosen=chosen.to(self.device),
            lengths=self._index([one.lengths[k] for k in (0, 1) for one in branches]),
            gates=repeated_gates(gates, times).to(self.device),
            logits=first.preset == "paper",
            masked=first.masked,
            layers=frozenset({n_layers - 1} if first.last_layer_only else range(n_layers)),
        )

    def _index(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)
