"""Tables hold no more history than their sampler needs: a step reads and writes all of it."""

import pytest

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
