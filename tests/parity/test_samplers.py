"""Every sampler against diffusers' scheduler, over whole trajectories driven by the same nonlinear "model"."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers import AysSchedules
from torch import Tensor

from engine.models.config import ScheduleConfig
from engine.sampling.samplers import SAMPLERS, WITH_ETA, make_table
from engine.sampling.table import SamplerTable, step
from tests.pipelines import SCHEDULER, SCHEDULERS, SD_V1_5_SCHEDULER, relative_error


def _model(x: Tensor, timestep: Tensor) -> Tensor:
    """A smooth stand-in for the UNet: bounded, dependent on position and timestep."""
    return torch.tanh(0.7 * x + torch.roll(x, 1, -1) * 0.3 + float(timestep) / 2000) * 1.1


def _ours(table: SamplerTable, latents: Tensor, draws: list[Tensor], image: Tensor | None = None) -> Tensor:
    x = table.start_noise * latents if image is None else table.image_scale * image + table.image_noise * latents
    history = table.start_history(x)
    for i in range(len(table)):
        prediction = _model(x * table.coefficients.input_scale[i], table.timesteps[i])
        noise = draws[i] if i < table.noise_draws else None
        x, history = step(table.coefficients, x, prediction, torch.full((len(x),), i), history, noise)
    return x


_WITH_GENERATOR = ("ddim", "ddpm", "euler_ancestral", "dpmpp_2m_sde", "lcm", "tcd")


class _BrownianPath:
    """In place of diffusers' Brownian tree: the same law, a path whose every new piece is drawn in order."""

    def __init__(self, like: Tensor, generator: torch.Generator) -> None:
        self.like, self.generator, self.path = like, generator, {}

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        start, end = float(sigma), float(sigma_next)
        self.path.setdefault(start, torch.zeros_like(self.like))
        known = min(self.path)  # the path goes down
        drawn = torch.randn(self.like.shape, generator=self.generator)
        self.path[end] = self.path[known] + (known - end) ** 0.5 * drawn
        return (self.path[end] - self.path[start]) / (start - end) ** 0.5


def theirs(name: str, config: dict, steps: int, schedule: str | None = None) -> Any:
    """diffusers' scheduler, set to some steps of a schedule."""
    scheduler_class, extra = SCHEDULERS[name]
    extra = extra | _SCHEDULE_OPTIONS.get(schedule, {})
    scheduler = scheduler_class.from_config(config, **extra)
    if schedule == "ays" and name != "euler_ancestral":
        scheduler.set_timesteps(timesteps=AysSchedules["StableDiffusionTimesteps"])
    else:
        scheduler.set_timesteps(steps)
    if schedule and name == "euler_ancestral":  # which takes no schedule, but any levels
        other = theirs("euler", config, steps, schedule)
        scheduler.sigmas, scheduler.timesteps = other.sigmas, other.timesteps
    if schedule in ("exponential", "beta") and not scheduler.timesteps.is_floating_point():
        scheduler.timesteps[0] = 999  # rounding makes a fraction less of it, and cutting off 998
    if name == "deis":  # in float32 its coefficients cancel: a relative 1.7e-5 after 100 steps
        scheduler.sigmas = scheduler.sigmas.double()
    return scheduler


_SCHEDULE_OPTIONS: dict[str | None, dict[str, Any]] = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "sgm_uniform": {"timestep_spacing": "trailing"},
}


def _theirs(scheduler, name: str, latents: Tensor, seed: int, eta: float, begin: int, image) -> Tensor:
    begin *= getattr(scheduler, "order", 1)  # as StableDiffusionImg2ImgPipeline counts
    timesteps = scheduler.timesteps[begin:]
    generator = torch.Generator().manual_seed(seed)
    if image is None:
        x = latents * scheduler.init_noise_sigma
    else:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        x = scheduler.add_noise(image, latents, timesteps[:1])
    if name == "dpmpp_sde":
        scheduler.noise_sampler = _BrownianPath(latents, generator)
    for timestep in timesteps:
        prediction = _model(scheduler.scale_model_input(x, timestep), timestep)
        options = {"generator": generator} if name in _WITH_GENERATOR else {}
        if name in WITH_ETA:
            options["eta"] = eta
        x = scheduler.step(prediction, timestep, x, **options).prev_sample
    return x


def _compare(
    name: str, config: dict, steps: int, eta: float = 0.0, begin: int = 0, schedule: str | None = None
) -> float:
    latents = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(7))
    image = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(8)) if begin else None
    generator = torch.Generator().manual_seed(9)
    draws = [torch.randn(latents.shape, generator=generator) for _ in range(2 * steps)]
    ours = _ours(make_table(name, ScheduleConfig.from_dict(config), steps, eta, begin, schedule), latents, draws, image)
    expected = _theirs(theirs(name, config, steps, schedule), name, latents, 9, eta, begin, image)
    return relative_error(ours, expected)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 14, 15, 20, 50])
@pytest.mark.parametrize("name", SAMPLERS)
def test_whole_trajectory(name: str, steps: int) -> None:
    assert _compare(name, SCHEDULER, steps) <= 1e-5


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 20, 31, 50])
@pytest.mark.parametrize("name", SAMPLERS)
def test_on_sd_v1_5_own_file(name: str, steps: int, agrees) -> None:
    against = SCHEDULERS[name][0].__name__ + "".join(f", {key}={value!r}" for key, value in SCHEDULERS[name][1].items())
    agrees(f"sampler `{name}`", against, _compare(name, SD_V1_5_SCHEDULER, steps), 1e-5)


@pytest.mark.parametrize("begin", [1, 4])
@pytest.mark.parametrize("name", SAMPLERS)
def test_from_a_picture_on_sd_v1_5_own_file(name: str, begin: int) -> None:
    assert _compare(name, SD_V1_5_SCHEDULER, 10, begin=begin) <= 1e-5


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("class_name", ["PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "LCMScheduler"])
def test_in_memory_and_saved_configs(name: str, class_name: str, tmp_path: Path) -> None:
    """A scheduler in memory marks what nobody said; one that was saved and read again has said it."""
    scheduler = getattr(diffusers, class_name).from_config(SD_V1_5_SCHEDULER)
    assert "timestep_spacing" in scheduler.config["_use_default_values"]
    scheduler.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert "timestep_spacing" in saved
    assert _compare(name, dict(scheduler.config), 8) <= 1e-5
    assert _compare(name, saved, 8) <= 1e-5


@pytest.mark.parametrize("change", [{}, {"prediction_type": "v_prediction"}, {"timestep_spacing": "trailing"}], ids=str)
@pytest.mark.parametrize("steps", [4, 5, 17, 20])
def test_pndm_with_runge_kutta_steps(steps: int, change: dict) -> None:
    assert _compare("pndm", {**SD_V1_5_SCHEDULER, "skip_prk_steps": False, **change}, steps) <= 1e-5


def test_pndm_refusals() -> None:
    with_runge_kutta = ScheduleConfig.from_dict({**SD_V1_5_SCHEDULER, "skip_prk_steps": False})
    with pytest.raises(ValueError, match=r"steps must be more than the 3 Runge-Kutta steps .*, got 3"):
        make_table("pndm", with_runge_kutta, 3)
    with pytest.raises(ValueError, match="starts from a picture only on a schedule with skip_prk_steps"):
        make_table("pndm", with_runge_kutta, 10, begin=2)
    with pytest.raises(ValueError, match="predicts epsilon or v, got prediction_type='sample'"):
        make_table("pndm", ScheduleConfig.from_dict({**SD_V1_5_SCHEDULER, "prediction_type": "sample"}), 10)


@pytest.mark.parametrize("steps", [100, 250])
@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"lcm", "tcd"}))
def test_many_steps(name: str, steps: int) -> None:
    assert _compare(name, SCHEDULER, steps) <= 1e-5


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("steps", [2, 20])
@pytest.mark.parametrize("name", WITH_ETA)
def test_eta(name: str, steps: int, eta: float) -> None:
    assert _compare(name, SCHEDULER, steps, eta) <= 1e-5


@pytest.mark.parametrize(
    "change",
    [
        {"timestep_spacing": "linspace"},
        {"timestep_spacing": "trailing"},
        {"prediction_type": "v_prediction"},
        {"steps_offset": 0},
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        {"set_alpha_to_one": True},
        {"use_karras_sigmas": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_other_schedules(name: str, change: dict) -> None:
    assert _compare(name, {**SCHEDULER, **change}, 17) <= 1e-5


@pytest.mark.parametrize("begin", [1, 4, 9])
@pytest.mark.parametrize("name", SAMPLERS)
def test_from_a_picture(name: str, begin: int) -> None:
    assert _compare(name, SCHEDULER, 10, begin=begin) <= 1e-5


@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_may_be_at_different_steps(name: str) -> None:
    """A row's result does not depend on where the rows beside it are."""
    table = make_table(name, ScheduleConfig.from_dict(SCHEDULER), 12)
    x, prediction, noise = torch.randn(3, 3, 4, 4, 4).unbind(0)
    history = torch.randn(table.coefficients.state.shape[-1] - 1, 3, 4, 4, 4)
    position = torch.tensor([0, 5, 11])
    together, kept = step(table.coefficients, x, prediction, position, history, noise)
    for row in range(3):
        rows = slice(row, row + 1)
        alone, kept_alone = step(
            table.coefficients, x[rows], prediction[rows], position[rows], history[:, rows], noise[rows]
        )
        torch.testing.assert_close(together[rows], alone, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(kept[:, rows], kept_alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "steps"), [("ddim", 1001), ("dpmpp_2m", 1000), ("unipc", 1000), ("lcm", 51)])
def test_too_many_steps(name: str, steps: int) -> None:
    with pytest.raises(ValueError, match=str(steps)):
        make_table(name, ScheduleConfig.from_dict(SCHEDULER), steps)
