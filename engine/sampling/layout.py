"""Who is in a batch of the UNet: rows that own their attention maps, rows that follow them, rows that mix.

A *trajectory* is one latent on its way from noise to picture; a *row* is one evaluation of the UNet on a trajectory's
latents. A plain guided picture is one trajectory of two rows. A layout is plain data, built image by image;
``plan.py`` makes tensors of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from ..methods.concept import Concept
from ..methods.concept_cache import Text, Texts
from ..methods.dci import DCI, Branches, make_branches
from ..methods.infusion import Infusion, token_positions
from ..text.words import find_noun, find_phrase, word_pattern
from .hints import picture_of
from .request import Request

Residuals = Mapping[int, Sequence[tuple[Concept, float]]]  # concepts and strengths that act on a token, by its position
Row = tuple[int, int]  # segment and number within it

PLAIN, CONCEPT, AUXILIARY, FOLLOWER = range(4)  # the segments of a batch, in order


@dataclass(frozen=True, slots=True)
class Owner:
    """A row with attention maps of its own."""

    trajectory: int
    text: Text


@dataclass(frozen=True, slots=True)
class Follower:
    """A row under the maps of its leader, with residuals at some of the leader's tokens."""

    trajectory: int
    leader: Row
    residuals: Residuals


@dataclass(frozen=True, slots=True)
class Pair:
    """A concept row and the auxiliary row that it mixes with; both segments have their rows in the pairs' order."""

    image: int
    dci: DCI
    branches: Branches

    @property
    def kind(self) -> tuple[object, ...]:
        """What must be alike in all pairs of a batch."""
        return self.dci.preset, self.dci.masked, self.dci.last_layer_only


@dataclass(frozen=True, slots=True)
class Drawn:
    """Where an image's picture comes from: its trajectory, its foundation's, and the row whose maps are watched."""

    trajectory: int
    foundation: int | None
    owner: Row
    words: list[list[int]]  # positions of each attention word's tokens


class Layout:
    """The rows of one phase, built image by image.

    Args:
        request: with the texts of the phase.
        texts: of the request.
        written: the request with its prompts as they were given, which tell trajectories apart in every phase.
        controls: those of the request's that act in the phase.
    """

    def __init__(self, request: Request, texts: Texts, written: Request, controls: tuple[int, ...] = ()) -> None:
        self.request, self.known, self.written, self.controls = request, texts, written, controls
        self.is_guided = request.options.guidance_scale != 1
        self.trajectories: dict[Hashable, int] = {}  # the start of each, by what tells it from the others
        self.guided: list[tuple[Row, Row]] = []  # the unconditional and conditional row of each trajectory
        self.owners: dict[int, list[Owner]] = {PLAIN: [], CONCEPT: [], AUXILIARY: []}
        self.followers: list[Follower] = []
        self.pairs: list[Pair] = []
        self.drawn: list[Drawn] = []  # per image

    def add_plain(self, i: int, concepts: tuple[Concept, ...]) -> None:
        self._check_placeholders(i, concepts)
        trajectory = self._shared_trajectory(i, concepts)
        self._add_picture(trajectory, None, self.guided[trajectory][1])

    def add_infusion(self, i: int, infusion: Infusion) -> None:
        prompt = self.request.prompts[i]
        residuals = token_positions(self.known.tokens(self.known.text(prompt)), infusion)
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
            leader = self._own(PLAIN, trajectory, self.known.text(prompt))
        self._guide(unconditional, self._follow(trajectory, leader, residuals))
        self._add_picture(trajectory, foundation, leader)

    def add_dci(self, i: int, dci: DCI, mixes: bool) -> None:
        prompt = self.request.prompts[i]
        branches = make_branches(prompt, dci, self.known)
        self._check_placeholders(i, dci.concepts)
        trajectory = self._new_trajectory(("dci", i), i)
        unconditional = self._own_unconditional(trajectory, i, dci.concepts)
        segment, text = (CONCEPT, branches.texts[0]) if mixes else (PLAIN, self.known.text(prompt, dci.concepts))
        conditional = self._own(segment, trajectory, text)
        self._guide(unconditional, conditional)
        self._add_picture(trajectory, None, conditional)
        if not mixes:
            return
        start = i if dci.noise == "shared" else len(self.request.prompts) + i
        auxiliary = self._new_trajectory(("auxiliary", i), start)
        if dci.guidance == "own":
            unconditional = self._own_unconditional(auxiliary, i, dci.concepts)
        self._guide(unconditional, self._own(AUXILIARY, auxiliary, branches.texts[1]))
        self.pairs.append(Pair(i, dci, branches))
        self._check_alike(dci)

    @property
    def all_owners(self) -> list[Owner]:
        """The map-owning rows, in their order in the batch."""
        return [owner for segment in self.owners.values() for owner in segment]

    @property
    def n_rows(self) -> int:
        return len(self.all_owners) + len(self.followers)

    @property
    def mixing_kind(self) -> tuple[object, ...] | None:
        """What must be alike in all pairs of a batch; None where no rows mix."""
        return self.pairs[0].kind if self.pairs else None

    @property
    def images(self) -> list[int]:
        """For each trajectory the first image that it is of; starts are images', or auxiliary ones behind them."""
        return [start % len(self.request.prompts) for start in self.trajectories.values()]

    def number(self, row: Row) -> int:
        """A row's place in the batch: plain rows, concept rows, auxiliary rows, followers."""
        segment, number = row
        return sum(len(self.owners[before]) for before in range(segment)) + number

    def slots(self) -> list[list[int]]:
        """For each map-owning row the tokens whose columns are wanted, in order of position, filled up with token 0."""
        wanted: list[set[int]] = [set() for _ in self.all_owners]
        for follower in self.followers:
            wanted[self.number(follower.leader)] |= follower.residuals.keys()
        for drawn in self.drawn:
            wanted[self.number(drawn.owner)].update(position for word in drawn.words for position in word)
        n_slots = max(map(len, wanted))
        return [(sorted(positions) + [0] * n_slots)[:n_slots] for positions in wanted]

    def _shared_trajectory(self, i: int, concepts: tuple[Concept, ...]) -> int:
        """The plain trajectory of image ``i``, shared by all images with the same texts and the same start."""
        request = self.request
        hints = tuple(picture_of(one, i, len(request.seeds)) for one in request.hints)
        written = self.written.prompts[i], self.written.negative_prompts[i]
        key = (*written, concepts, *request.start_of(i), hints, request.image_prompts[i])
        if key not in self.trajectories:
            trajectory = self._new_trajectory(key, i)
            unconditional = self._own_unconditional(trajectory, i, concepts)
            self._guide(unconditional, self._own(PLAIN, trajectory, self.known.text(request.prompts[i], concepts)))
        return list(self.trajectories).index(key)

    def _check_placeholders(self, i: int, concepts: tuple[Concept, ...]) -> None:
        """What a concept has learned must have its place in the prompt."""
        placeholders = [concept.placeholder for concept in concepts if concept.tokens is not None]
        if placeholders:
            tokens = self.known.tokens(self.known.text(self.request.prompts[i], concepts))
            for placeholder in placeholders:
                find_phrase(tokens, word_pattern(placeholder), placeholder, 0)

    def _check_alike(self, dci: DCI) -> None:
        """What cannot differ within a batch must be the same for all pairs."""
        for name in ("preset", "masked", "last_layer_only"):
            given = getattr(self.pairs[0].dci, name), getattr(dci, name)
            if given[0] != given[1]:
                raise ValueError(
                    f"{name} must be the same for all DCI images of one request, got {given[0]!r} and {given[1]!r}"
                )

    def _new_trajectory(self, key: Hashable, start: int) -> int:
        self.trajectories[key] = start
        return len(self.trajectories) - 1

    def _add_picture(self, trajectory: int, foundation: int | None, owner: Row) -> None:
        self.drawn.append(Drawn(trajectory, foundation, owner, self._word_positions(owner)))

    def _word_positions(self, owner: Row) -> list[list[int]]:
        """Positions of each attention word's tokens in the text of a row."""
        segment, number = owner
        tokens = self.known.tokens(self.owners[segment][number].text)
        return [find_noun(tokens, word) for word in self.request.options.attention_words]

    def _guide(self, unconditional: Row | None, conditional: Row) -> None:
        self.guided.append((conditional if unconditional is None else unconditional, conditional))

    def _own(self, segment: int, trajectory: int, text: Text) -> Row:
        self.owners[segment].append(Owner(trajectory, text))
        return segment, len(self.owners[segment]) - 1

    def _own_unconditional(self, trajectory: int, i: int, concepts: tuple[Concept, ...]) -> Row | None:
        text = self.known.text(self.request.negative_prompts[i], concepts)
        return self._own(PLAIN, trajectory, text) if self.is_guided else None

    def _follow(self, trajectory: int, leader: Row, residuals: Residuals) -> Row:
        self.followers.append(Follower(trajectory, leader, residuals))
        return FOLLOWER, len(self.followers) - 1
