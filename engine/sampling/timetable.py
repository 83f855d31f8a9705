"""Schedules as the loop needs them: the sampler's table, and what the UNet is told at its steps."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from torch import Tensor

from ..models.config import ScheduleConfig
from ..models.controlnet import ControlNetModel
from ..models.unet import UNet2DConditionModel
from .samplers import make_table
from .table import SamplerTable

if TYPE_CHECKING:
    from .request import Request

_KEPT = 16


@dataclass(frozen=True, slots=True, eq=False)
class Timetable:
    """A sampler on a schedule of T evaluations of the UNet.

    Attributes:
        table: the sampler's, on the UNet's device.
        shifts: (T, sum of C), ``UNet2DConditionModel.time_shifts`` of its timesteps.
    """

    table: SamplerTable
    shifts: Tensor
    _of_nets: WeakKeyDictionary[ControlNetModel, Tensor] = field(default_factory=WeakKeyDictionary, repr=False)

    def __len__(self) -> int:
        return len(self.table)

    def shifts_of(self, net: ControlNetModel) -> Tensor:
        """A ControlNet's (T, sum of C), computed once for as long as it lives."""
        found = self._of_nets.get(net)
        if found is None:
            found = self._of_nets[net] = net.time_shifts(self.table.timesteps)
        return found


class Timetables:
    """Those of one model that were asked for last: requests on one schedule share one, and its place in a batch."""

    def __init__(self, unet: UNet2DConditionModel, schedule: ScheduleConfig) -> None:
        self.unet, self.schedule = unet, schedule
        self._kept = OrderedDict[tuple[str, int, float, int, str | None], Timetable]()

    def of(self, request: Request) -> Timetable:
        """A request's."""
        asked = request.options
        return self(asked.sampler, asked.steps, asked.eta, request.begin, asked.schedule)

    def __call__(self, sampler: str, steps: int, eta: float, begin: int, schedule: str | None) -> Timetable:
        """See ``samplers.make_table``."""
        key = sampler, steps, eta, begin, schedule
        found = self._kept.pop(key, None)  # threads that miss at once each make their own, which are equal
        if found is None:
            table = make_table(sampler, self.schedule, steps, eta, begin, schedule).to(self.unet.conv_in.weight.device)
            found = Timetable(table, self.unet.time_shifts(table.timesteps))
        self._kept[key] = found
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return found
