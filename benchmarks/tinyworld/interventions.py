"""Infusion taken apart: residuals at some layers or steps, other tokens, and more of the foundation than its text maps.

A foundation is drawn once and what it attends to is kept; a customised picture then follows it under an intervention,
in two rows instead of four. For studies only: nothing here is a way to draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import engine
from engine.kernels.attention import attention_ref
from engine.methods.concept_cache import Texts
from engine.models.conditioning import Batch, Following
from engine.models.transformer import SelfAttention
from engine.sampling.arguments import Options
from engine.sampling.loop import Stepper, denoise, start_denoising
from engine.sampling.pictures import to_pictures
from engine.sampling.plan import GuidedBatch, make_plans
from engine.sampling.request import make_request
from engine.sampling.samplers import make_table
from engine.sampling.start import start
from engine.sampling.step import Phase, State, guided_step
from engine.sampling.timetable import Timetable
from engine.text.encoder import Tokens
from engine.text.words import find_noun

SLOTS = ("noun", "before", "start", "end")  # the noun, the token before it, the begin and the end token
Residuals = Mapping[str, Sequence[Tensor]]  # by slot, per cross-attention layer (H, C), projected
Maps = dict[SelfAttention, tuple[Tensor, Tensor]]  # queries and keys (rows, N, C)


@dataclass(frozen=True, slots=True)
class Part:
    """Residuals that act in the steps from ``first`` up to ``last``, as shares of all, from the noisiest."""

    residuals: Residuals
    first: float = 0.0
    last: float = 1.0


@dataclass(frozen=True, slots=True)
class Intervention:
    """How a customised picture departs from the method.

    Attributes:
        sides: residuals act at layers of side x side positions of these sides alone.
        first, last: and in these steps alone; see ``Part``.
        strength: their factor.
        self_maps: self-attention takes the foundation's maps too, for this share of the steps.
        cut: the noun's map is cut to the silhouette of the foundation's object.
        power: the map is raised to it, over its largest value, which stays.
    """

    sides: tuple[int, ...] = (16, 8, 4, 2)
    first: float = 0.0
    last: float = 1.0
    strength: float = 1.0
    self_maps: float = 0.0
    cut: bool = False
    power: float = 1.0


def slot_positions(text: Tokens, noun: str) -> list[int]:
    """The position of each of ``SLOTS`` in a prompt."""
    at = find_noun(text, noun)[-1]
    return [at, at - 1, 0, len(text.spans) + 1]


class Foundations:
    """Ordinary pictures, and what the customised ones follow.

    Attributes:
        images: the pictures, one per text and seed.
        steps: per step and cross-attention layer, output (2I, N, C) and columns (2I, N, T*H) at ``SLOTS``: the
            unconditional rows, then the conditional ones.
        maps: per step, queries and keys of each self-attention, rows likewise.
    """

    _phase: Phase

    @torch.no_grad()
    def __init__(self, sd: engine.Engine, noun: str, texts: Sequence[str], seeds: Sequence[int], drawing: Any) -> None:
        self.sd, self.steps, self.maps = sd, list[list[tuple[Tensor, Tensor]]](), list[Maps]()
        self.request = make_request(sd.limits, list(texts), Options(seed=list(seeds), **drawing))
        options = self.request.options
        self.table = make_table(options.sampler, sd.schedule, options.steps)
        (plan,) = make_plans(self.request, len(self.table), Texts(sd.text_encoder), sd.concepts, sd.device)
        self.start, noise, _ = start(self.request, self.table, sd._vae, sd.device)
        self.guidance_scale = plan.rows.guidance_scale
        self._rows = torch.cat([plan.rows.unconditional, plan.rows.conditional])
        places = torch.tensor([slot_positions(sd.text_encoder.tokenize(text), noun) for text in texts])
        tokens = torch.zeros(len(self._rows), len(SLOTS), dtype=torch.int64)
        tokens[plan.rows.conditional] = places
        nobody = torch.empty(0, dtype=torch.int64)
        watched = Following(tokens, nobody, ())

        def run(_name: str, _one_step: Any, phase: Phase, state: State) -> tuple[Tensor, Tensor, Tensor]:
            batch = replace(phase.rows.batch, following=watched, shared=None)
            self._phase = replace(phase, rows=replace(phase.rows, batch=batch))
            kept: list[tuple[Tensor, Tensor]] = []
            keep = lambda _layer, out, columns: kept.append((out[self._rows], columns[self._rows]))  # noqa: E731
            with _recorded(sd, self._rows) as maps:
                result = guided_step(sd.unet, self._phase, state, keep)
            self.steps.append(kept)
            self.maps.append(maps)
            return result

        timetable = Timetable(self.table, sd.unet.time_shifts(self.table.timesteps))
        denoising = start_denoising([plan], timetable, self.start, noise)
        denoise(Stepper(sd.unet, run), denoising, lambda _i, _x: True)
        self.images: list[Image.Image] = to_pictures(sd._vae, self.request.options, denoising.x)

    @torch.no_grad()
    def draw(self, parts: Sequence[Part], how: Intervention, silhouettes: Tensor) -> list[Image.Image]:
        """The customised pictures; ``silhouettes`` (I, 16, 16) in [0, 1] are of the foundation's objects."""
        n, x = len(self.start), self.start
        history, everyone = self.table.start_history(x), torch.arange(2 * n)
        slots = [slot for slot in SLOTS if any(slot in part.residuals for part in parts)]
        for i in range(len(self.table)):
            share = i / len(self.table)
            acting = [part for part in parts if part.first <= share < part.last and how.first <= share < how.last]
            foundation = self._foundation(i, slots, how.power, silhouettes if how.cut else None)
            residuals = self._residuals(acting, slots, how, foundation)
            batch = Batch((), Following(torch.empty(0), everyone, residuals, foundation))
            rows = GuidedBatch(batch, everyone % n, everyone[:n], everyone[n:], self.guidance_scale)
            state = State(x, history, torch.full((n,), i), None)
            with _replaced(self.sd, self.maps[i] if share < how.self_maps else {}):
                x, history, _ = guided_step(self.sd.unet, replace(self._phase, rows=rows), state)
        return to_pictures(self.sd._vae, self.request.options, x)

    def _foundation(
        self, i: int, slots: Sequence[str], power: float, silhouettes: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor], ...]:
        found, chosen = [], [SLOTS.index(slot) for slot in slots]
        for out, columns in self.steps[i]:
            acting = columns.unflatten(2, (len(SLOTS), -1))[:, :, chosen].flatten(2)
            if power != 1.0:
                acting = acting * (acting / acting.amax(dim=1, keepdim=True)) ** (power - 1)
            if silhouettes is not None:
                cover = F.adaptive_avg_pool2d(silhouettes, _side(out)).flatten(1)
                acting = acting * torch.cat([cover, cover])[..., None]
            found.append((out, acting))
        return tuple(found)

    def _residuals(
        self,
        acting: Sequence[Part],
        slots: Sequence[str],
        how: Intervention,
        foundation: Sequence[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, ...]:
        """Per layer (2I, T*H, C): nothing for the unconditional rows."""
        n, residuals = len(self.start), []
        for layer, (out, columns) in enumerate(foundation):
            values = out.new_zeros(2 * n, len(slots), columns.shape[2] // len(slots), out.shape[2])
            if _side(out) in how.sides:
                for part in acting:
                    for slot, own in part.residuals.items():
                        values[n:, slots.index(slot)] += how.strength * own[layer]
            residuals.append(values.flatten(1, 2))
        return tuple(residuals)


def mass_on(foundations: Foundations, silhouettes: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """By side of a layer (I,): the share of the noun's map on the object, and the object's of the picture."""
    n, found = len(foundations.start), dict[int, list[Tensor]]()
    for step in foundations.steps:
        for out, columns in step:
            noun = columns[n:].unflatten(2, (len(SLOTS), -1))[:, :, 0].mean(dim=2)
            cover = F.adaptive_avg_pool2d(silhouettes, _side(out)).flatten(1)
            found.setdefault(_side(out), []).append((noun * cover).sum(dim=1) / noun.sum(dim=1))
    chance = silhouettes.flatten(1).mean(dim=1)
    return {side: (torch.stack(shares).mean(dim=0), chance) for side, shares in found.items()}


def _side(out: Tensor) -> int:
    return round(out.shape[1] ** 0.5)


@contextmanager
def _recorded(sd: engine.Engine, rows: Tensor) -> Iterator[Maps]:
    """The queries and keys of every self-attention that runs within."""
    maps: Maps = {}

    def recording(module: SelfAttention) -> Any:
        def attention(q: Tensor, k: Tensor, v: Tensor, n_heads: int) -> Tensor:
            maps[module] = q[rows], k[rows]
            return attention_ref(q, k, v, n_heads)

        return attention

    with _attending(sd, recording):
        yield maps


@contextmanager
def _replaced(sd: engine.Engine, maps: Maps) -> Iterator[None]:
    """Self-attention by kept queries and keys, where there are some."""

    def following(module: SelfAttention) -> Any:
        if module not in maps:
            return module.ops.attention
        return lambda _q, _k, v, n_heads: attention_ref(*maps[module], v, n_heads)

    with _attending(sd, following):
        yield


@contextmanager
def _attending(sd: engine.Engine, make: Any) -> Iterator[None]:
    """Every self-attention computes ``make(module)(q, k, v, n_heads)`` within."""
    modules = [module for module in sd.unet.modules() if isinstance(module, SelfAttention)]
    before = [module.ops for module in modules]
    for module in modules:
        module.ops = replace(module.ops, attention=make(module), small=None)
    try:
        yield
    finally:
        for module, ops in zip(modules, before, strict=True):
            module.ops = ops
