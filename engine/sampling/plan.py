"""The rows of a UNet batch: who sees which latents, which text, whose attention maps, and who mixes with whom.

A *trajectory* is one latent on its way from noise to picture; a *row* is one evaluation of the UNet on a trajectory's
latents. A plain guided picture is one trajectory of two rows. A plan is data: a customisation changes indices and
values, never code. Auxiliary branches leave after their steps, so a request has a plan per phase.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..methods.concept import Concept
from ..methods.dci import DCI, Branches, make_branches
from ..methods.ico import TextKV
from ..methods.infusion import Infusion, token_positions
from ..models.conditioning import Following, Mixing, Shared
from ..observe.word_maps import Watched
from ..text.encoder import Text, TextEncoder, find_noun, find_phrase, word_pattern
from .request import Request

Encode = Callable[[Sequence[Text]], TextKV]
Project = Callable[[Concept], tuple[Tensor, ...]]
Residuals = Mapping[int, Sequence[Concept]]  # the concepts whose residual acts on a token, by its position
Row = tuple[int, int]  # segment and number within it

_PLAIN, _CONCEPT, _AUXILIARY, _FOLLOWER = range(4)  # the segments of a batch, in order


@dataclass(frozen=True, slots=True)
class RowPlan:
    """R rows for P trajectories of I images; indices are int64 tensors on the model's device.

    Attributes:
        steps: how many steps this plan is for.
        inherits: (P,) the trajectory of the plan before that each trajectory goes on from.
        starts: (P,) the start and step noise each trajectory takes: an image's, or I + i for the independent noise of
            image i's auxiliary branch.
        trajectories: (R,) the trajectory whose latents each row sees.
        texts: (R - F,) which of the encoded texts each map-owning row attends to; the F others follow one of these.
        text_kv: per cross-attention layer, keys and values (n_texts, S, C) of the encoded texts.
        unconditional, conditional: (P,) the two rows that guidance combines; one row twice where it is off.
        guidance_scale: (P, 1, 1, 1) float32.
        following: how rows follow others, and whose map columns are watched; None for neither.
        mixing: how the last map-owning rows mix; None if none does.
        shared: the same as ``trajectories`` where there are fewer trajectories than rows, else None.
        mixed_images: the image of each mixing pair.
        watched: for each image its map-owning row, and the slots of each attention word's tokens among the columns.
        pictures: (I,) each image's own trajectory.
        foundations: each image's foundation trajectory, None where it has none.
    """

    steps: int
    inherits: Tensor
    starts: Tensor
    trajectories: Tensor
    texts: Tensor
    text_kv: TextKV
    unconditional: Tensor
    conditional: Tensor
    guidance_scale: Tensor
    following: Following | None
    mixing: Mixing | None
    shared: Shared | None
    mixed_images: tuple[int, ...]
    watched: tuple[Watched, ...]
    pictures: Tensor
    foundations: tuple[int | None, ...]


def make_plans(
    request: Request, steps: int, text_encoder: TextEncoder, encode: Encode, project: Project, device: torch.device
) -> list[RowPlan]:
    """Lay out the rows of a request.

    Args:
        request: what to draw.
        steps: how many steps are taken.
        text_encoder: tokenizes prompts.
        encode: gives keys and values of texts; each distinct text is encoded once, for all phases.
        project: gives a concept's projected residual values (H, C), per layer.
        device: where the plans' tensors go.

    Returns:
        One plan per phase; a phase ends where an auxiliary branch does.

    Raises:
        ValueError: a customised noun is absent from its prompt, ambiguous or cut off.
    """
    ends = {custom.mixing_steps(steps) for custom in request.customizations if isinstance(custom, DCI)}
    bounds = sorted({0, steps} | ends)
    phases = []
    for first, last in pairwise(bounds):
        rows = _Rows(request, text_encoder)
        for i, custom in enumerate(request.customizations):
            if isinstance(custom, Infusion):
                rows.add_infusion(i, custom)
            elif isinstance(custom, DCI):
                rows.add_dci(i, custom, mixes=first < custom.mixing_steps(steps))
            else:
                rows.add_plain(i, () if custom is None else tuple(custom.concepts))
        phases.append((last - first, rows))
    texts = list(dict.fromkeys(text for _, rows in phases for text in rows.texts()))
    text_kv = encode(texts)
    plans, before = [], list(phases[0][1].trajectories)
    for n_steps, rows in phases:
        order = list(rows.trajectories)
        inherits = [before.index(key) for key in order]
        plans.append(rows.plan(n_steps, inherits, texts, text_kv, project, device))
        before = order
    return plans


class _Rows:
    """Builds a plan image by image."""

    def __init__(self, request: Request, text_encoder: TextEncoder) -> None:
        self.request, self.text_encoder = request, text_encoder
        self.is_guided = request.guidance_scale != 1
        self.trajectories: dict[Hashable, int] = {}  # the start of each, by what tells it from the others
        self.guided: list[tuple[Row, Row]] = []  # the unconditional and conditional row of each trajectory
        self.pictures: list[int] = []
        self.foundations: list[int | None] = []
        self.owners: dict[int, list[tuple[int, Text]]] = {_PLAIN: [], _CONCEPT: [], _AUXILIARY: []}  # trajectory first
        self.followers: list[tuple[int, Row, Residuals]] = []  # trajectory, leader, residuals
        self.pairs: list[tuple[int, DCI, Branches]] = []  # image first
        self.watched: list[tuple[Row, list[list[int]]]] = []  # per image: owner, and each word's token positions

    def add_plain(self, i: int, concepts: tuple[Concept, ...]) -> None:
        self._check_placeholders(i, concepts)
        trajectory = self._shared_trajectory(i, concepts)
        self._add_picture(trajectory, None, self.guided[trajectory][1])

    def add_infusion(self, i: int, infusion: Infusion) -> None:
        prompt = self.request.prompts[i]
        residuals = token_positions(self.text_encoder.tokenize(prompt), infusion)
        if infusion.foundation == "parallel":
            foundation = self._shared_trajectory(i, ())
            leader_unconditional, leader = self.guided[foundation]
            trajectory = self._new_trajectory(("infusion", i), i)
            if infusion.unconditional_maps == "foundation":
                unconditional = self._follow(trajectory, leader_unconditional, {}) if self.is_guided else None
            else:
                unconditional = self._own_unconditional(trajectory, i, ())
        else:  # both pipelines see the same latents, so their unconditional rows are one
            foundation, trajectory = None, self._new_trajectory(("infusion", i), i)
            unconditional = self._own_unconditional(trajectory, i, ())
            leader = self._own(_PLAIN, trajectory, Text(prompt))
        self._guide(unconditional, self._follow(trajectory, leader, residuals))
        self._add_picture(trajectory, foundation, leader)

    def add_dci(self, i: int, dci: DCI, mixes: bool) -> None:
        prompt = self.request.prompts[i]
        branches = make_branches(prompt, dci, self.text_encoder)
        self._check_placeholders(i, dci.concepts)
        trajectory = self._new_trajectory(("dci", i), i)
        unconditional = self._own_unconditional(trajectory, i, dci.concepts)
        segment, text = (_CONCEPT, branches.texts[0]) if mixes else (_PLAIN, Text(prompt, dci.concepts))
        conditional = self._own(segment, trajectory, text)
        self._guide(unconditional, conditional)
        self._add_picture(trajectory, None, conditional)
        if not mixes:
            return
        start = i if dci.noise == "shared" else len(self.request.prompts) + i
        auxiliary = self._new_trajectory(("auxiliary", i), start)
        if dci.guidance == "own":
            unconditional = self._own_unconditional(auxiliary, i, dci.concepts)
        self._guide(unconditional, self._own(_AUXILIARY, auxiliary, branches.texts[1]))
        self.pairs.append((i, dci, branches))

    def texts(self) -> list[Text]:
        """The text of each map-owning row."""
        return [text for segment in self.owners.values() for _, text in segment]

    def plan(
        self,
        steps: int,
        inherits: Sequence[int],
        texts: list[Text],
        text_kv: TextKV,
        project: Project,
        device: torch.device,
    ) -> RowPlan:
        owners = [owner for segment in self.owners.values() for owner in segment]
        slots = self._slots(len(owners))
        columns_wanted = self.followers or self.request.attention_words
        trajectories = [trajectory for trajectory, *_ in (*owners, *self.followers)]
        firsts = [trajectories.index(trajectory) for trajectory in range(len(self.trajectories))]

        def index(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return RowPlan(
            steps=steps,
            inherits=index(inherits),
            starts=index(list(self.trajectories.values())),
            trajectories=index(trajectories),
            texts=index([texts.index(text) for _, text in owners]),
            text_kv=text_kv,
            unconditional=index([self._number(row) for row, _ in self.guided]),
            conditional=index([self._number(row) for _, row in self.guided]),
            guidance_scale=torch.full((len(self.guided), 1, 1, 1), self.request.guidance_scale, device=device),
            following=self._following(slots, project, device) if columns_wanted else None,
            mixing=self._mixing(len(text_kv), device) if self.pairs else None,
            shared=Shared(index(trajectories), index(firsts)) if len(firsts) < len(trajectories) else None,
            mixed_images=tuple(i for i, _, _ in self.pairs),
            watched=tuple(
                (self._number(row), [[slots[self._number(row)].index(position) for position in word] for word in words])
                for row, words in self.watched
            ),
            pictures=index(self.pictures),
            foundations=tuple(self.foundations),
        )

    def _number(self, row: Row) -> int:
        """A row's place in the batch: plain rows, concept rows, auxiliary rows, followers."""
        segment, number = row
        return sum(len(self.owners[before]) for before in range(segment)) + number

    def _slots(self, n_owners: int) -> list[list[int]]:
        """For each map-owning row the tokens whose columns are wanted, in order of position, filled up with token 0."""
        wanted: list[set[int]] = [set() for _ in range(n_owners)]
        for _, leader, residuals in self.followers:
            wanted[self._number(leader)] |= residuals.keys()
        for row, words in self.watched:
            wanted[self._number(row)].update(position for word in words for position in word)
        n_slots = max(map(len, wanted))
        return [(sorted(positions) + [0] * n_slots)[:n_slots] for positions in wanted]

    def _following(self, slots: list[list[int]], project: Project, device: torch.device) -> Following:
        """Each follower's residual values, in its leader's slots; those of other tokens stay zero."""
        values = list[Tensor]()
        leaders = [self._number(leader) for _, leader, _ in self.followers]
        for number, (_, _, residuals) in enumerate(self.followers):
            own_slots = slots[leaders[number]]
            for position, concepts in residuals.items():
                for concept in concepts:
                    projected = project(concept)
                    values = values or [p.new_zeros(len(leaders), len(own_slots), *p.shape) for p in projected]
                    for value, residual in zip(values, projected, strict=True):
                        value[number, own_slots.index(position)] += residual
        return Following(
            tokens=torch.tensor(slots, dtype=torch.int64, device=device),
            leaders=torch.tensor(leaders, dtype=torch.int64, device=device),
            residuals=tuple(value.flatten(1, 2) for value in values),
        )

    def _mixing(self, n_layers: int, device: torch.device) -> Mixing:
        """The pairs' masks and gates; what cannot differ within a batch must be the same for all pairs."""
        first = self.pairs[0][1]
        for _, dci, _ in self.pairs:
            for name in ("preset", "masked", "last_layer_only"):
                if getattr(dci, name) != getattr(first, name):
                    given = f"{getattr(first, name)!r} and {getattr(dci, name)!r}"
                    raise ValueError(f"{name} must be the same for all DCI images of one request, got {given}")
        length = self.text_encoder.max_length
        branches = [branches for _, _, branches in self.pairs]
        gates = [(dci.strength, *dci.scales) for _, dci, _ in self.pairs]
        chosen = torch.zeros(2 * len(branches), length, dtype=torch.bool)
        for k in (0, 1):
            for number, one in enumerate(branches):
                chosen[k * len(branches) + number, one.chosen[k]] = True
        lengths = [one.lengths[k] for k in (0, 1) for one in branches]
        return Mixing(
            chosen=chosen.to(device),
            lengths=torch.tensor(lengths, dtype=torch.int64, device=device),
            gates=torch.tensor(gates, dtype=torch.float32, device=device),
            logits=first.preset == "paper",
            masked=first.masked,
            layers=frozenset({n_layers - 1} if first.last_layer_only else range(n_layers)),
        )

    def _shared_trajectory(self, i: int, concepts: tuple[Concept, ...]) -> int:
        """The plain trajectory of image ``i``, shared by all images with the same texts and the same start."""
        request = self.request
        prompt, negative = request.prompts[i], request.negative_prompts[i]
        own_start = i if request.image is not None or request.latents is not None else None
        key = (prompt, negative, concepts, request.seeds[i], own_start)
        if key not in self.trajectories:
            trajectory = self._new_trajectory(key, i)
            unconditional = self._own_unconditional(trajectory, i, concepts)
            self._guide(unconditional, self._own(_PLAIN, trajectory, Text(prompt, concepts)))
        return list(self.trajectories).index(key)

    def _check_placeholders(self, i: int, concepts: tuple[Concept, ...]) -> None:
        """What a concept has learned must have its place in the prompt."""
        placeholders = [concept.placeholder for concept in concepts if concept.tokens is not None]
        if placeholders:
            tokens = self.text_encoder.tokenize(self.request.prompts[i], concepts)
            for placeholder in placeholders:
                find_phrase(tokens, word_pattern(placeholder), placeholder, 0)

    def _new_trajectory(self, key: Hashable, start: int) -> int:
        self.trajectories[key] = start
        return len(self.trajectories) - 1

    def _add_picture(self, trajectory: int, foundation: int | None, owner: Row) -> None:
        self.pictures.append(trajectory)
        self.foundations.append(foundation)
        self.watched.append((owner, self._word_positions(owner)))

    def _word_positions(self, owner: Row) -> list[list[int]]:
        """Positions of each attention word's tokens in the text of a row."""
        words = self.request.attention_words
        if not words:
            return []
        _, text = self.owners[owner[0]][owner[1]]
        tokens = self.text_encoder.tokenize(text.prompt, text.concepts)
        return [find_noun(tokens, word) for word in words]

    def _guide(self, unconditional: Row | None, conditional: Row) -> None:
        self.guided.append((conditional if unconditional is None else unconditional, conditional))

    def _own(self, segment: int, trajectory: int, text: Text) -> Row:
        self.owners[segment].append((trajectory, text))
        return segment, len(self.owners[segment]) - 1

    def _own_unconditional(self, trajectory: int, i: int, concepts: tuple[Concept, ...]) -> Row | None:
        text = Text(self.request.negative_prompts[i], concepts)
        return self._own(_PLAIN, trajectory, text) if self.is_guided else None

    def _follow(self, trajectory: int, leader: Row, residuals: Residuals) -> Row:
        self.followers.append((trajectory, leader, residuals))
        return _FOLLOWER, len(self.followers) - 1
