"""The rows of a UNet batch: who sees which latents, which text, and whose attention maps.

A *trajectory* is one latent on its way from noise to picture; a *row* is one evaluation of the UNet on a trajectory's
latents. A plain guided picture is one trajectory of two rows. A plan is data: a customisation changes indices and
residual values, never code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import Watched
from .concept import Concept
from .infusion import find_noun, token_positions
from .request import Request
from .text import TextEncoder
from .unet import Following

Project = Callable[[Concept], tuple[Tensor, ...]]
Residuals = Mapping[int, Sequence[Concept]]  # the concepts whose residual acts on a token, by its position


@dataclass(frozen=True, slots=True)
class RowPlan:
    """R rows for P trajectories of I images; indices are int64 tensors on the model's device.

    Attributes:
        images: (P,) the image whose start and step noise each trajectory takes.
        trajectories: (R,) the trajectory whose latents each row sees.
        texts: (R - F,) which of the encoded texts each map-owning row attends to; the F others follow one of these.
        context: (n_texts, S, E) encoded texts.
        unconditional, conditional: (P,) the two rows that guidance combines; one row twice where it is off.
        guidance_scale: (P, 1, 1, 1) float32.
        following: how rows follow others, and whose map columns are watched; None for neither.
        watched: for each image its map-owning row, and the slots of each attention word's tokens among the columns.
        pictures: (I,) each image's own trajectory.
        foundations: each image's foundation trajectory, None where it has none.
    """

    images: Tensor
    trajectories: Tensor
    texts: Tensor
    context: Tensor
    unconditional: Tensor
    conditional: Tensor
    guidance_scale: Tensor
    following: Following | None
    watched: tuple[Watched, ...]
    pictures: Tensor
    foundations: tuple[int | None, ...]


def make_plan(request: Request, text_encoder: TextEncoder, project: Project, device: torch.device) -> RowPlan:
    """Lay out the rows of a request.

    Args:
        request: what to draw.
        text_encoder: encodes each distinct text once.
        project: gives a concept's projected residual values (H, C), per layer.
        device: where the plan's tensors go.

    Raises:
        ValueError: a customised noun is absent from its prompt, ambiguous or cut off.
    """
    rows = _Rows(request, text_encoder)
    for i in range(len(request.prompts)):
        rows.add_image(i)
    return rows.plan(project, device)


class _Rows:
    """Builds a plan image by image. Until all are known, a following row is called ``~number`` among the followers."""

    def __init__(self, request: Request, text_encoder: TextEncoder) -> None:
        self.request, self.text_encoder = request, text_encoder
        self.is_guided = request.guidance_scale != 1
        self.images: list[int] = []  # of each trajectory
        self.guided: list[tuple[int, int]] = []  # the unconditional and conditional row of each trajectory
        self.pictures: list[int] = []
        self.foundations: list[int | None] = []
        self.owners: list[tuple[int, str]] = []  # trajectory and text
        self.followers: list[tuple[int, int, Residuals]] = []  # trajectory, leader, residuals
        self.watched: list[tuple[int, list[list[int]]]] = []  # per image: leader, and each word's token positions
        self._plain: dict[tuple, int] = {}  # uncustomised trajectories, by all that decides them

    def add_image(self, i: int) -> None:
        infusion = self.request.customizations[i]
        prompt, negative = self.request.prompts[i], self.request.negative_prompts[i]
        tokens = self.text_encoder.tokenize(prompt)
        words = [find_noun(tokens, word) for word in self.request.attention_words]
        if infusion is None:
            trajectory = self._plain_trajectory(i)
            self.pictures.append(trajectory)
            self.foundations.append(None)
            self.watched.append((self.guided[trajectory][1], words))
            return
        residuals = token_positions(tokens, infusion)
        if infusion.foundation == "parallel":
            foundation = self._plain_trajectory(i)
            leader_unconditional, leader = self.guided[foundation]
            trajectory = self._new_trajectory(i)
            if infusion.unconditional_maps == "foundation":
                unconditional = self._follow(trajectory, leader_unconditional, {}) if self.is_guided else None
            else:
                unconditional = self._own(trajectory, negative) if self.is_guided else None
        else:  # both pipelines see the same latents, so their unconditional rows are one
            foundation, trajectory = None, self._new_trajectory(i)
            unconditional = self._own(trajectory, negative) if self.is_guided else None
            leader = self._own(trajectory, prompt)
        self.watched.append((leader, words))
        self._guide(unconditional, self._follow(trajectory, leader, residuals))
        self.pictures.append(trajectory)
        self.foundations.append(foundation)

    def plan(self, project: Project, device: torch.device) -> RowPlan:
        texts = list(dict.fromkeys(text for _, text in self.owners))
        slots = self._slots()
        columns_wanted = self.followers or self.request.attention_words

        def index(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        def number(row: int) -> int:
            return row if row >= 0 else len(self.owners) + ~row

        return RowPlan(
            images=index(self.images),
            trajectories=index([trajectory for trajectory, *_ in (*self.owners, *self.followers)]),
            texts=index([texts.index(text) for _, text in self.owners]),
            context=self.text_encoder.encode(texts),
            unconditional=index([number(row) for row, _ in self.guided]),
            conditional=index([number(row) for _, row in self.guided]),
            guidance_scale=torch.full((len(self.images), 1, 1, 1), self.request.guidance_scale, device=device),
            following=self._following(slots, project, device) if columns_wanted else None,
            watched=tuple(
                (row, [[slots[row].index(position) for position in word] for word in words])
                for row, words in self.watched
            ),
            pictures=index(self.pictures),
            foundations=tuple(self.foundations),
        )

    def _slots(self) -> list[list[int]]:
        """For each map-owning row the tokens whose columns are wanted, in order of position, filled up with token 0."""
        wanted: list[set[int]] = [set() for _ in self.owners]
        for _, leader, residuals in self.followers:
            wanted[leader] |= residuals.keys()
        for row, words in self.watched:
            wanted[row].update(at for word in words for at in word)
        n_slots = max(map(len, wanted))
        return [(sorted(positions) + [0] * n_slots)[:n_slots] for positions in wanted]

    def _following(self, slots: list[list[int]], project: Project, device: torch.device) -> Following:
        """Each follower's residual values, in its leader's slots; those of other tokens stay zero."""
        n_slots, values = len(slots[0]), list[Tensor]()
        for number, (_, leader, residuals) in enumerate(self.followers):
            for position, concepts in residuals.items():
                for concept in concepts:
                    projected = project(concept)
                    values = values or [p.new_zeros(len(self.followers), n_slots, *p.shape) for p in projected]
                    for value, residual in zip(values, projected, strict=True):
                        value[number, slots[leader].index(position)] += residual
        return Following(
            tokens=torch.tensor(slots, dtype=torch.int64, device=device),
            leaders=torch.tensor([leader for _, leader, _ in self.followers], dtype=torch.int64, device=device),
            residuals=tuple(value.flatten(1, 2) for value in values),
        )

    def _plain_trajectory(self, i: int) -> int:
        """The uncustomised trajectory of image ``i``, shared by all images with the same texts and the same start."""
        request = self.request
        prompt, negative = request.prompts[i], request.negative_prompts[i]
        own_start = i if request.image is not None or request.latents is not None else None
        key = (prompt, negative, request.seeds[i], own_start)
        if key not in self._plain:
            trajectory = self._plain[key] = self._new_trajectory(i)
            unconditional = self._own(trajectory, negative) if self.is_guided else None
            self._guide(unconditional, self._own(trajectory, prompt))
        return self._plain[key]

    def _new_trajectory(self, i: int) -> int:
        self.images.append(i)
        return len(self.images) - 1

    def _guide(self, unconditional: int | None, conditional: int) -> None:
        self.guided.append((conditional if unconditional is None else unconditional, conditional))

    def _own(self, trajectory: int, text: str) -> int:
        self.owners.append((trajectory, text))
        return len(self.owners) - 1

    def _follow(self, trajectory: int, leader: int, residuals: Residuals) -> int:
        self.followers.append((trajectory, leader, residuals))
        return ~(len(self.followers) - 1)
