"""Named schedules and zero terminal SNR against diffusers' schedulers, over whole trajectories."""

import numpy as np
import pytest
import scipy.stats
import torch

from engine.models.config import ScheduleConfig
from engine.sampling.levels import beta_quantile
from engine.sampling.samplers import SAMPLERS, make_table
from engine.sampling.schedule import SCHEDULES
from tests.parity.test_samplers import _compare
from tests.pipelines import SCHEDULER, SD_V1_5_SCHEDULER

_BY_TIMESTEP = ("ddim", "ddpm", "pndm", "lcm", "tcd")
_BY_LEVEL = [name for name in SAMPLERS if name not in (*_BY_TIMESTEP, "dpmpp_2m_karras")]
_ZERO_SNR = {**SD_V1_5_SCHEDULER, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
_WITH_ZERO_SNR = [name for name, sampler in SAMPLERS.items() if sampler.least_signal is not None]


@pytest.mark.parametrize("steps", [1, 2, 8, 20])
@pytest.mark.parametrize("schedule", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("name", _BY_LEVEL)
def test_noise_levels(name: str, schedule: str, steps: int, agrees) -> None:
    for config in (SCHEDULER, SD_V1_5_SCHEDULER):
        error = _compare(name, config, steps, schedule=schedule)
        agrees(f"schedule `{schedule}`", f"schedulers with use_{schedule}_sigmas", error, 1e-5)


@pytest.mark.parametrize("steps", [1, 4, 17])
@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"lcm", "tcd", "dpmpp_2m_karras"}))
def test_sgm_uniform(name: str, steps: int, agrees) -> None:
    error = _compare(name, SD_V1_5_SCHEDULER, steps, schedule="sgm_uniform")
    agrees("schedule `sgm_uniform`", "schedulers with timestep_spacing='trailing'", error, 1e-5)


@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde"])
def test_align_your_steps(name: str, agrees) -> None:
    error = _compare(name, SD_V1_5_SCHEDULER, 10, schedule="ays")
    agrees("schedule `ays`, 10 steps", "schedulers with timesteps=AysSchedules", error, 1e-5)


def test_align_your_steps_in_other_numbers() -> None:
    """Every other of twenty levels is one of the ten."""
    schedule = ScheduleConfig.from_dict(SD_V1_5_SCHEDULER)
    ten, twenty = (make_table("euler", schedule, steps, schedule="ays") for steps in (10, 20))
    torch.testing.assert_close(twenty.timesteps[::2], ten.timesteps, rtol=1e-5, atol=1e-3)
    assert torch.equal(make_table("dpmpp_2m", schedule, 20, schedule="ays").timesteps, twenty.timesteps.round())
    between = twenty.coefficients.input_scale.double()[:3] ** -2 - 1
    torch.testing.assert_close(between[1], (between[0] * between[2]).sqrt(), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="schedule 'ays' needs 1000 training timesteps, got 500"):
        make_table("euler", ScheduleConfig(num_train_timesteps=500), 10, schedule="ays")


@pytest.mark.parametrize("schedule", ["karras", "beta", "sgm_uniform"])
@pytest.mark.parametrize("name", ["euler", "dpm2", "dpmpp_sde", "deis", "dpmpp_2m_sde"])
def test_from_a_picture(name: str, schedule: str) -> None:
    assert _compare(name, SD_V1_5_SCHEDULER, 9, begin=3, schedule=schedule) <= 1e-5


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", _WITH_ZERO_SNR)
def test_zero_terminal_snr(name: str, spacing: str, agrees) -> None:
    tolerance = 1e-5 if name != "euler" else 3e-5  # it begins at a noise level of 4096, in float32
    for begin in (0, 2):
        error = _compare(name, {**_ZERO_SNR, "timestep_spacing": spacing}, 12, begin=begin)
        agrees("zero terminal SNR, v-prediction", "schedulers with rescale_betas_zero_snr", error, tolerance)


def test_zero_terminal_snr_starts_from_noise_alone() -> None:
    config = ScheduleConfig.from_dict({**_ZERO_SNR, "timestep_spacing": "trailing"})
    table = make_table("ddim", config, 5)
    assert (table.image_scale, table.image_noise) == (0.0, 1.0)
    assert torch.isfinite(table.coefficients.state).all()


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - set(_WITH_ZERO_SNR)))
def test_samplers_that_know_no_zero_terminal_snr(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"sampler must be one of ddim, euler, .* for a model of zero terminal SNR, got {name!r}"
    ):
        make_table(name, ScheduleConfig.from_dict(_ZERO_SNR), 5)


def test_refusals() -> None:
    config = ScheduleConfig.from_dict(SD_V1_5_SCHEDULER)
    for name in _BY_TIMESTEP:
        for schedule in set(SCHEDULES) - ({"sgm_uniform"} if name not in ("lcm", "tcd") else set()):
            with pytest.raises(ValueError, match=f"that the sampler takes, got {schedule!r} with sampler={name!r}"):
                make_table(name, config, 5, schedule=schedule)
    with pytest.raises(ValueError, match="'dpmpp_2m_karras' has the schedule 'karras', got schedule='beta'"):
        make_table("dpmpp_2m_karras", config, 5, schedule="beta")
    with pytest.raises(ValueError, match="rescale_betas_zero_snr needs prediction_type 'v_prediction' or 'sample'"):
        ScheduleConfig.from_dict({**_ZERO_SNR, "prediction_type": "epsilon"})


def test_an_alias_and_a_configs_own_schedule() -> None:
    config = ScheduleConfig.from_dict(SD_V1_5_SCHEDULER)
    tables = [
        make_table("dpmpp_2m", config, 9, schedule="karras"),
        make_table("dpmpp_2m_karras", config, 9),
        make_table("dpmpp_2m_karras", config, 9, schedule="karras"),
        make_table("dpmpp_2m", ScheduleConfig(use_karras_sigmas=True), 9),
    ]
    assert all(torch.equal(table.coefficients.state, tables[0].coefficients.state) for table in tables)
    own = make_table("dpmpp_2m", ScheduleConfig(use_karras_sigmas=True), 9, schedule="exponential")
    assert torch.equal(own.timesteps, make_table("dpmpp_2m", config, 9, schedule="exponential").timesteps)


def test_quantiles_of_the_beta_distribution() -> None:
    u = np.concatenate([np.linspace(0, 1, 101), [1e-9, 1e-4, 1 - 1e-4]])
    np.testing.assert_allclose(beta_quantile(u, 0.6), scipy.stats.beta.ppf(u, 0.6, 0.6), rtol=1e-9, atol=1e-15)
