"""ControlNets in a batch: which rows they act upon, what they are told there, and requests with them put together.

A net's rows are rows of the batch, on the same latents, with the net's own keys and values of the same texts; what it
gives is added to these rows alone. Where a net acts at some of the steps, these are phases of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..methods.concept_cache import Text
from ..methods.control import Control, check_fit
from ..models.conditioning import Batch, Conditioning, Residuals, Shared, TextKV
from ..models.controlnet import ControlNetModel
from ..models.unet import UNet2DConditionModel
from .hints import picture_of
from .layout import Layout
from .request import Request
from .timetable import Timetable


@dataclass(frozen=True, slots=True)
class NetRows:
    """N rows of a batch that a ControlNet acts upon, the same at every step of a phase; indices are int64 tensors.

    Attributes:
        net: the ControlNet.
        use: which of the uses of this net these rows are; above 0 where a picture has it twice, with two hints. So no
            row is added to twice at once, in an order that a GPU would not keep.
        batch: keys and values of the rows' texts, as the net projects them; and which share latents and hint.
        rows: (N,) their places in the UNet's batch.
        trajectories: (N,) whose latents each sees.
        hints: (N, C, h, w) the net's features of their hints, or (E, C, h, w) where ``batch.shared`` has E entries.
        scales: (N, L), see ``Residuals``.
    """

    net: ControlNetModel
    use: int
    batch: Batch
    rows: Tensor
    trajectories: Tensor
    hints: Tensor
    scales: Tensor


def control_ends(request: Request, steps: int) -> set[int]:
    """The steps, among the ``steps`` that are taken, before which a net comes or leaves.

    Raises:
        ValueError: a control's start and end leave it no step.
    """
    ends = set[int]()
    for control in request.options.control:
        acting = [step for step in range(steps) if control.acts(step, steps)]
        if not acting and control.weight:
            rule = "start and end of a control must leave it one of the steps at least"
            raise ValueError(f"{rule}, got start={control.start} and end={control.end} with {steps} steps")
        ends |= {acting[0], acting[-1] + 1} if acting else set()
    return ends


def acting(request: Request, step: int, steps: int) -> tuple[int, ...]:
    """Which of the request's controls act at a step."""
    return tuple(k for k, control in enumerate(request.options.control) if control.acts(step, steps))


def rows_of(layout: Layout, control: Control) -> list[tuple[int, int, Text]]:
    """The rows that a control acts upon: place, trajectory, and text, which a follower has from its leader."""
    owners = layout.all_owners
    texts = [owner.text for owner in owners]
    rows = [(row, owner.trajectory, owner.text) for row, owner in enumerate(owners)]
    for row, follower in enumerate(layout.followers, start=len(owners)):
        rows.append((row, follower.trajectory, texts[layout.number(follower.leader)]))
    unconditional = {layout.number(one) for one, other in layout.guided if one != other}
    return [one for one in rows if not (control.conditional_only and one[0] in unconditional)]


def cost_in_rows(layout: Layout) -> int:
    """What a step of a layout's phase costs, in rows of the UNet; a net, its way down and middle, is half of one."""
    controls = [layout.request.options.control[k] for k in layout.controls]
    return layout.n_rows + -(-sum(len(rows_of(layout, control)) for control in controls) // 2)


class NetPlanner:
    """Makes ``NetRows`` of a request's layouts; hints and texts are projected once for all of its phases.

    Args:
        request: whose controls act.
        known: all texts of its rows.
        context: (len(known), S, E), these encoded.
        unet: the model's, which the nets must fit.

    Raises:
        ValueError: a net is of another model, device or dtype.
    """

    def __init__(self, request: Request, known: Sequence[Text], context: Tensor, unet: UNet2DConditionModel) -> None:
        self.request, self.known, self.context, self.like = request, known, context, unet.conv_in.weight
        self._texts: dict[ControlNetModel, TextKV] = {}
        for control in request.options.control:
            net, weight = control.net, control.net.conv_in.weight
            check_fit(f"control {net.name!r}", net.config, unet.config)
            if (weight.device, weight.dtype) != (self.like.device, self.like.dtype):
                rule = "load it for this model: engine.load_controlnet(path, sd)"
                raise ValueError(
                    f"control {net.name!r} must be on {self.like.device} in {self.like.dtype} as the model is, got "
                    f"{weight.device} and {weight.dtype}; {rule}"
                )

    @cached_property
    def features(self) -> list[Tensor]:
        """For each control those of its hints, (K, C, h, w)."""
        pairs = zip(self.request.options.control, self.request.hints, strict=True)
        return [control.net.hint(hints) for control, hints in pairs]

    def rows(self, layout: Layout) -> tuple[NetRows, ...]:
        """Of the controls that act in a layout's phase."""
        controls = [self.request.options.control[k] for k in layout.controls]
        nets = [control.net for control in controls]
        return tuple(
            self._rows(layout, k, control, use=nets[:at].count(control.net))
            for at, (k, control) in enumerate(zip(layout.controls, controls, strict=True))
        )

    def _rows(self, layout: Layout, k: int, control: Control, use: int) -> NetRows:
        net, found = control.net, rows_of(layout, control)
        rows, trajectories, texts = zip(*found, strict=True)
        entries = list(dict.fromkeys(trajectories))
        hints, images, n_images = self.features[k], layout.images, len(self.request.seeds)
        pictures = [picture_of(hints, images[trajectory], n_images) for trajectory in entries]
        index = self._index([self.known.index(text) for text in texts])
        shared = None
        if len(entries) < len(rows):
            firsts = self._index([trajectories.index(trajectory) for trajectory in entries])
            shared = Shared(self._index([entries.index(trajectory) for trajectory in trajectories]), firsts)
        scales = control.weight * (net.guess_scales() if control.guess_mode else torch.ones(net.n_residuals))
        return NetRows(
            net=net,
            use=use,
            batch=Batch(tuple((keys[index], values[index]) for keys, values in self._text(net)), shared=shared),
            rows=self._index(rows),
            trajectories=self._index(trajectories),
            hints=hints[self._index(pictures)],
            scales=scales.to(self.like.device, self.like.dtype).expand(len(rows), -1).contiguous(),
        )

    def _text(self, net: ControlNetModel) -> TextKV:
        if net not in self._texts:
            self._texts[net] = net.text_kv(self.context)
        return self._texts[net]

    def _index(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.like.device)


def net_residuals(
    nets: Sequence[NetRows], shifts: Sequence[Tensor], latents: Tensor, positions: Tensor
) -> tuple[Residuals, ...]:
    """What the nets add at one step.

    Args:
        nets: whose rows.
        shifts: for each (T, sum of C), its ``time_shifts`` on the schedule.
        latents: (P, 4, h, w), each trajectory's as the UNet sees them.
        positions: (P,) each trajectory's entry of the schedule.
    """
    found = []
    for one, own in zip(nets, shifts, strict=True):
        shared = one.batch.shared
        seen = one.trajectories if shared is None else one.trajectories[shared.firsts]
        condition = Conditioning(one.batch, own[positions[one.trajectories]])
        found.append(one.net.residuals(latents[seen], one.hints, condition, one.rows, one.scales))
    return tuple(found)


def net_shifts(nets: Sequence[NetRows], timetables: Sequence[Timetable]) -> tuple[Tensor, ...]:
    """For each net its ``time_shifts`` on schedules one after the other."""
    return tuple(torch.cat([timetable.shifts_of(one.net) for timetable in timetables]) for one in nets)


def join_nets(
    batches: Sequence[Sequence[NetRows]], places: Sequence[Tensor], starts: Sequence[int], size: Callable[[int], int]
) -> tuple[NetRows, ...]:
    """The nets of several batches on the rows of one, each net once.

    Args:
        batches: of each batch its nets.
        places: of each batch its rows' places in the joined one.
        starts: of each batch the place of its first trajectory.
        size: what the rows of a net, and their latents, are filled up to. What is filled in repeats the first and adds
            nothing.
    """
    together: dict[tuple[ControlNetModel, int], list[tuple[NetRows, Tensor, int]]] = {}
    for nets, own, start in zip(batches, places, starts, strict=False):
        for one in nets:
            together.setdefault((one.net, one.use), []).append((one, own, start))
    return tuple(_joined(parts, size) for parts in together.values())


def _joined(parts: Sequence[tuple[NetRows, Tensor, int]], size: Callable[[int], int]) -> NetRows:
    nets = [one for one, _, _ in parts]
    entries, firsts, n_rows, n_entries = [], [], 0, 0
    for one in nets:
        everyone = torch.arange(len(one.rows), device=one.rows.device)
        shared = one.batch.shared or Shared(everyone, everyone)
        entries.append(shared.rows + n_entries)
        firsts.append(shared.firsts + n_rows)
        n_rows, n_entries = n_rows + len(one.rows), n_entries + len(shared.firsts)
    filled, filled_entries = _filled(n_rows, size, entries[0]), _filled(n_entries, size, entries[0])
    seen, layers = torch.cat(entries)[filled], zip(*(one.batch.text for one in nets), strict=True)
    shared = Shared(seen, torch.cat(firsts)[filled_entries]) if len(filled_entries) < len(filled) else None
    scales = torch.cat([one.scales for one in nets])
    return NetRows(
        net=nets[0].net,
        use=nets[0].use,
        batch=Batch(
            text=tuple(
                (torch.cat(keys)[filled], torch.cat(values)[filled])
                for keys, values in (zip(*layer, strict=True) for layer in layers)
            ),
            shared=shared,
        ),
        rows=torch.cat([own[one.rows] for one, own, _ in parts])[filled],
        trajectories=torch.cat([one.trajectories + start for one, _, start in parts])[filled],
        hints=torch.cat([one.hints for one in nets])[seen if shared is None else filled_entries],
        scales=F.pad(scales, (0, 0, 0, len(filled) - n_rows)),
    )


def _filled(count: int, size: Callable[[int], int], like: Tensor) -> Tensor:
    """0 to ``count`` - 1, and 0 for all up to ``size(count)``."""
    return F.pad(torch.arange(count, device=like.device), (0, size(count) - count))
