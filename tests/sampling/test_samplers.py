"""Tables hold no more history than their sampler needs: a step reads and writes all of it."""

import pytest

import engine
from engine.models.config import ScheduleConfig
from engine.sampling.samplers import SAMPLERS, make_table
from tests.pipelines import SD_V1_5_SCHEDULER

SCHEDULE = ScheduleConfig.from_dict(SD_V1_5_SCHEDULER)
_HISTORY = {
    "ddim": 0, "euler": 0, "euler_ancestral": 0, "lcm": 0, "heun": 2, "dpmpp_2m": 1, "dpmpp_2m_karras": 1, "pndm": 3,
    "unipc": 3, "ddpm": 0, "dpm2": 1, "dpmpp_2m_sde": 1, "dpmpp_sde": 2, "deis": 1, "tcd": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_history(name: str) -> None:
    table = make_table(name, SCHEDULE, 10)
    assert table.coefficients.state.shape[-1] - 1 == _HISTORY[name]


def test_every_schedule_has_a_timetable_of_its_own(small: engine.Engine) -> None:
    kept = [small.timetables("euler", 4, 0.0, 0, schedule) for schedule in (None, "karras", "beta")]
    assert len({tuple(one.table.timesteps.tolist()) for one in kept}) == 3
    assert small.timetables("euler", 4, 0.0, 0, "karras") is kept[1]
