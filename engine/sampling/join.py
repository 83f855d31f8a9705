"""Requests in one batch of the UNet: their rows, schedules and states put together.

A row carries all that tells it from others as data, so rows of different requests differ in nothing that a batch could
not hold: texts, followers, pairs that mix, guidance, samplers and positions are gathered, and only indices change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.conditioning import Batch, Following, Mixing, Shared
from .control import join_nets, net_shifts
from .image_rows import join_images
from .inpaint import join_inpainting
from .keys import with_common_keys
from .plan import GuidedBatch, RowPlan
from .step import Phase, State
from .table import Coefficients, join_coefficients
from .timetable import Timetable

if TYPE_CHECKING:
    from .loop import Denoising

Size = Callable[[int], int]  # a count -> the count to fill up to
_ROOM = 64  # schedules have entries in multiples of this, so that runs of 20 and of 50 steps are of one size


def exactly(count: int) -> int:
    """A batch as it comes."""
    return count


def bucket(count: int) -> int:
    """The next of 0, 1, 2, 3, 4, 6, 8, 12, 16, 24...: few sizes, each at most half as much again as is asked for."""
    power = 1 << max(0, count - 1).bit_length()
    return count if count <= 3 else power * 3 // 4 if count <= power * 3 // 4 else power


def join_phases(plans: Sequence[RowPlan], timetables: Sequence[Timetable], size: Size) -> tuple[Phase, list[int]]:
    """What the next step of some requests shares, and where in its schedule each request's begins."""
    distinct = list(dict.fromkeys(timetables))
    starts = dict(zip(distinct, accumulate(map(len, distinct), initial=0), strict=False))
    tables = [one.table.coefficients for one in distinct]
    coefficients = join_coefficients(tables, size(max(one.state.shape[-1] for one in tables)))
    shifts = torch.cat([one.shifts for one in distinct])
    rows = join_rows([plan.rows for plan in plans], size)
    phase = make_phase(rows, coefficients, shifts, size, net_shifts(rows.nets, distinct))
    return phase, [starts[one] for one in timetables]


def make_phase(
    rows: GuidedBatch,
    coefficients: Coefficients,
    shifts: Tensor,
    size: Size = exactly,
    net_shifts: Sequence[Tensor] = (),
) -> Phase:
    """A phase whose schedules, with shifts (T, sum of C) of UNet and nets on them, are filled up to a round length."""
    missing = _ROOM * size(-(-len(shifts) // _ROOM)) - len(shifts)
    padded = coefficients.map(lambda x: F.pad(x, (0, 0) * (x.ndim - 1) + (0, missing)))
    longer, *of_nets = (F.pad(one, (0, 0, 0, missing)) for one in (shifts, *net_shifts))
    return Phase(rows, padded, longer, tuple(of_nets))


def join_states(together: Sequence[Denoising], offsets: Sequence[int], phase: Phase) -> State:
    """The state of some requests before their next step, filled up to the trajectories of ``phase``."""
    n_history = phase.coefficients.state.shape[-1] - 1
    histories = [F.pad(one.history, (0, 0) * 4 + (0, n_history - len(one.history))) for one in together]
    positions = [
        torch.full_like(one.plan.starts, offset + one.taken) for one, offset in zip(together, offsets, strict=True)
    ]
    fresh = [one.fresh_noise() for one in together]
    noise = None
    if any(one.timetable.table.noise_draws for one in together):
        pairs = zip(together, fresh, strict=True)
        noise = torch.cat([torch.zeros_like(one.x) if drawn is None else drawn for one, drawn in pairs])
    inpainting = join_inpainting([one.next_inpainting() for one in together], [one.x for one in together])
    x, history = torch.cat([one.x for one in together]), torch.cat(histories, dim=1)
    state = State(x, history, torch.cat(positions), noise, inpainting)
    missing = len(phase.rows.unconditional) - len(state.x)
    if not missing:
        return state
    spare = torch.zeros(missing, dtype=torch.int64, device=state.x.device)
    filled = torch.cat([torch.arange(len(state.x), device=state.x.device), spare])  # with the first trajectory
    return State(
        state.x[filled],
        state.history[:, filled],
        state.positions[filled],
        None if noise is None else noise[filled],
        None if inpainting is None else inpainting.take(filled),
    )


def join_rows(batches: Sequence[GuidedBatch], size: Size = exactly) -> GuidedBatch:
    """One batch of the rows of several, in the order that all batches have: plain, concept, auxiliary, followers.

    Args:
        batches: whose pairs, where they have some, are of one kind; see ``Layout.mixing_kind``. Keys of shorter texts
            are repeated; see ``keys.py``.
        size: how many plain rows, pairs, followers, followed tokens and trajectories to fill up to. What is filled in
            repeats the first of its kind, and no trajectory that is asked for sees it.
    """
    if len(batches) == 1 and size is exactly:
        return batches[0]
    return _Joiner(with_common_keys(batches), size).joined()


class _Joiner:
    """Numbers all rows twice: flat, as they come batch by batch, and by their place in the joined batch."""

    def __init__(self, batches: Sequence[GuidedBatch], size: Size) -> None:
        self.batches, self.size = batches, size
        self.device = batches[0].trajectories.device
        self.n_owners = [len(one.batch.text[0][0]) for one in batches]
        self.n_trajectories = [len(one.unconditional) for one in batches]
        plain, concepts, auxiliaries, followers = [], [], [], []
        first_owner, first_follower = 0, 0
        for one, n_owners in zip(batches, self.n_owners, strict=True):
            n_pairs = 0 if one.batch.mixing is None else len(one.batch.mixing.gates)
            n_followers = len(one.trajectories) - n_owners
            flat = list(range(first_owner, first_owner + n_owners))
            n_plain = n_owners - 2 * n_pairs
            plain += flat[:n_plain]
            concepts += flat[n_plain : n_plain + n_pairs]
            auxiliaries += flat[n_plain + n_pairs :]
            followers += range(first_follower, first_follower + n_followers)
            first_owner, first_follower = first_owner + n_owners, first_follower + n_followers
        self.pairs = self._filled(range(len(concepts)))
        owners = [*self._filled(plain), *self._picked(concepts), *self._picked(auxiliaries)]
        self.owners, self.followers = owners, self._filled(followers)
        places = {flat: place for place, flat in reversed(list(enumerate(owners)))}  # the first of those that repeat
        self.places = []  # of each batch, its rows' places
        first_owner, first_follower = 0, len(owners)
        for one, n_owners in zip(batches, self.n_owners, strict=True):
            n_followers = len(one.trajectories) - n_owners
            own = [places[flat] for flat in range(first_owner, first_owner + n_owners)]
            self.places.append(self._index([*own, *range(first_follower, first_follower + n_followers)]))
            first_owner, first_follower = first_owner + n_owners, first_follower + n_followers

    def joined(self) -> GuidedBatch:
        owners, followers = self._index(self.owners), self._index(self.followers)
        starts = list(accumulate(self.n_trajectories, initial=0))
        parts = [
            (one.trajectories + start).split([n_owners, len(one.trajectories) - n_owners])
            for one, start, n_owners in zip(self.batches, starts, self.n_owners, strict=False)
        ]
        trajectories = torch.cat(
            [torch.cat([own for own, _ in parts])[owners], torch.cat([following for _, following in parts])[followers]]
        )
        filled = self._index(self._filled(range(starts[-1])))
        firsts = torch.cat([places[_firsts(one)] for one, places in zip(self.batches, self.places, strict=True)])
        return GuidedBatch(
            batch=Batch(
                text=tuple(
                    (torch.cat(keys)[owners], torch.cat(values)[owners])
                    for keys, values in (zip(*layer, strict=True) for layer in self._layers())
                ),
                following=self._following(owners, followers) if self.followers else None,
                mixing=self._mixing() if self.pairs else None,
                shared=Shared(trajectories, firsts[filled]) if len(filled) < len(trajectories) else None,
                images=join_images([one.batch for one in self.batches], self.n_owners, owners, self.size),
            ),
            trajectories=trajectories,
            unconditional=self._placed([one.unconditional for one in self.batches])[filled],
            conditional=self._placed([one.conditional for one in self.batches])[filled],
            guidance_scale=torch.cat([one.guidance_scale for one in self.batches])[filled],
            guidance_rescale=self._rescale(filled),
            nets=join_nets([one.nets for one in self.batches], self.places, starts, self.size),
        )

    def _rescale(self, filled: Tensor) -> Tensor | None:
        there = [one.guidance_rescale for one in self.batches]
        if all(one is None for one in there):
            return None
        pairs = zip(there, self.batches, strict=True)
        parts = [torch.zeros_like(one.guidance_scale) if own is None else own for own, one in pairs]
        return torch.cat(parts)[filled]

    def _layers(self) -> list[list[tuple[Tensor, Tensor]]]:
        """Per cross-attention layer, each batch's keys and values."""
        return [list(layer) for layer in zip(*(one.batch.text for one in self.batches), strict=True)]

    def _following(self, owners: Tensor, followers: Tensor) -> Following:
        there = [one.batch.following for one in self.batches]
        n_tokens = self.size(max(one.tokens.shape[1] for one in there if one is not None))
        tokens = [
            owners.new_zeros(n_owners, n_tokens) if one is None else _widened(one.tokens, n_tokens)
            for one, n_owners in zip(there, self.n_owners, strict=True)
        ]
        leaders = [places[one.leaders] for one, places in zip(there, self.places, strict=True) if one is not None]
        with_residuals = [one for one in there if one is not None and len(one.leaders)]
        layers = zip(*(_residuals(one, n_tokens) for one in with_residuals), strict=True)
        return Following(
            tokens=torch.cat(tokens)[owners],
            leaders=torch.cat(leaders)[followers],
            residuals=tuple(torch.cat(layer)[followers] for layer in layers),
        )

    def _mixing(self) -> Mixing:
        there = [one.batch.mixing for one in self.batches if one.batch.mixing is not None]
        pairs = self._index(self.pairs)

        def by_branch(parts: Sequence[Tensor]) -> Tensor:
            branches = zip(*(part.chunk(2) for part in parts), strict=True)
            return torch.cat([torch.cat(branch)[pairs] for branch in branches])

        return Mixing(
            chosen=by_branch([one.chosen for one in there]),
            lengths=by_branch([one.lengths for one in there]),
            gates=torch.cat([one.gates for one in there])[pairs],
            logits=there[0].logits,
            masked=there[0].masked,
            layers=there[0].layers,
        )

    def _placed(self, rows: Sequence[Tensor]) -> Tensor:
        return torch.cat([places[own] for own, places in zip(rows, self.places, strict=True)])

    def _filled(self, items: Sequence[int]) -> list[int]:
        return [*items, *([items[0]] * (self.size(len(items)) - len(items)) if items else ())]

    def _picked(self, of_pairs: Sequence[int]) -> list[int]:
        return [of_pairs[pair] for pair in self.pairs]

    def _index(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def _firsts(rows: GuidedBatch) -> Tensor:
    """One row of each trajectory (P,)."""
    shared = rows.batch.shared
    return torch.argsort(rows.trajectories) if shared is None else shared.firsts


def _widened(tokens: Tensor, n_tokens: int) -> Tensor:
    """Followed tokens (O, T), filled up with token 0."""
    return F.pad(tokens, (0, n_tokens - tokens.shape[1]))


def _residuals(following: Following, n_tokens: int) -> list[Tensor]:
    """Per layer (F, T*H, C), filled up with tokens that add nothing."""
    n_own = following.tokens.shape[1]
    return [
        F.pad(layer.unflatten(1, (n_own, -1)), (0, 0, 0, 0, 0, n_tokens - n_own)).flatten(1, 2)
        for layer in following.residuals
    ]
