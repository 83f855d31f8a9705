"""Noise schedules: which timesteps a sampler visits, and how much signal and noise there is at each.

The layouts are those of diffusers' schedulers, family by family, so that the same settings visit the same timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from ..models.config import ScheduleConfig
from .levels import NAMES, noise_levels

SCHEDULES = (*NAMES, "sgm_uniform")
PRK_STEPS = 3  # Runge-Kutta steps with which PNDM starts where it does

_MULTISTEP = ("multistep", "deis")  # they lay out one timestep more and leave out the last, and count in whole ones
_MIDPOINT = ("dpm2", "dpmpp_sde")  # they evaluate the model at the geometric mean of two levels too
_FRACTIONAL = ("euler", "euler_ancestral", "heun", *_MIDPOINT)
BY_LEVEL = (*_MULTISTEP, *_FRACTIONAL)  # families that take any noise level


@dataclass(frozen=True, slots=True)
class Schedule:
    """Signal and noise levels along a sampling run, float64.

    Attributes:
        timesteps: (T,) of the UNet's evaluations, descending; second-order samplers visit some twice.
        alphas, sigmas: (T + 1,) with ``x_t = alpha x_0 + sigma eps`` and ``alpha^2 + sigma^2 = 1``; the last entry is
            where the run ends: at no noise, or, for deis, at the least that the model was trained on.
        stride: training timesteps from one step to the next, as ddim and pndm count them.
        alphas_cumprod: of the training schedule, (num_train_timesteps,).
        end: alpha-bar before the first training timestep, where ddim and pndm end.
        spans_all: whether the first timestep is the training schedule's last ("linspace" and "trailing").
        skip_prk_steps: whether pndm starts without its Runge-Kutta steps.
    """

    timesteps: np.ndarray
    alphas: np.ndarray
    sigmas: np.ndarray
    stride: int
    alphas_cumprod: np.ndarray
    end: float
    prediction_type: str
    spans_all: bool
    skip_prk_steps: bool

    @property
    def log_snr(self) -> np.ndarray:
        """(T + 1,) ``log(alpha / sigma)``; infinite at the end."""
        with np.errstate(divide="ignore"):
            return np.log(self.alphas / self.sigmas)

    def level(self, timestep: float) -> tuple[float, float]:
        """alpha and sigma at a training timestep, or before the first."""
        bar = self.alphas_cumprod[int(timestep)] if timestep >= 0 else self.end
        return float(np.sqrt(bar)), float(np.sqrt(1 - bar))


def alphas_cumprod(config: ScheduleConfig) -> np.ndarray:
    """The training schedule's cumulative product of ``1 - beta``, (num_train_timesteps,).

    Formed in float32, as models were trained, then widened.
    """
    n = config.num_train_timesteps
    if config.trained_betas is not None:
        betas = torch.tensor(config.trained_betas, dtype=torch.float32)
    elif config.beta_schedule == "linear":
        betas = torch.linspace(config.beta_start, config.beta_end, n, dtype=torch.float32)
    elif config.beta_schedule == "scaled_linear":
        betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, n, dtype=torch.float32) ** 2
    else:  # squaredcos_cap_v2 (Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17)
        bar = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = torch.tensor(np.minimum(1 - bar[1:] / bar[:-1], 0.999), dtype=torch.float32)
    if config.rescale_betas_zero_snr:
        betas = _zero_terminal_snr(betas)
    return torch.cumprod(1.0 - betas, dim=0).numpy().astype(np.float64)


def _zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Betas of no signal at the last timestep (Lin et al. 2024, arXiv:2305.08891, algorithm 1)."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])


def make_schedule(
    config: ScheduleConfig, family: str, steps: int, name: str | None = None, least_signal: float = 0.0
) -> Schedule:
    """Lay out ``steps`` sampling steps.

    Args:
        config: the training schedule, of which nothing is left open.
        family: "ddim", "pndm", "euler", "euler_ancestral", "heun", "dpm2", "dpmpp_sde", "multistep", "deis" or "lcm":
            who rounds, who ends where.
        steps: number of steps, at most ``num_train_timesteps``.
        name: one of ``SCHEDULES``; where not given, the config's.
        least_signal: what stands for an alpha-bar of 0 at the last training timestep.

    Raises:
        ValueError: there are not so many steps.
    """
    if name == "sgm_uniform":
        config, name = replace(config, timestep_spacing="trailing"), None
    elif name is None and config.use_karras_sigmas and family in BY_LEVEL and family != "euler_ancestral":
        name = "karras"
    cumprod = alphas_cumprod(config)
    if config.rescale_betas_zero_snr:
        cumprod[-1] = least_signal
    with np.errstate(divide="ignore"):
        ratios = np.sqrt((1 - cumprod) / cumprod)
    timesteps = _lcm_timesteps(config, steps) if family == "lcm" else _timesteps(config, family, steps)
    if len(timesteps) != steps or np.any(np.diff(timesteps) >= 0) or timesteps[-1] < 0 or timesteps[0] >= len(cumprod):
        raise ValueError(
            f"steps must fit the {len(cumprod)} training timesteps with {config.timestep_spacing} spacing and "
            f"steps_offset {config.steps_offset}, got {steps}"
        )
    stride = config.num_train_timesteps // steps
    if family == "pndm":
        timesteps = _pndm_evaluations(timesteps, stride, config.skip_prk_steps)
    levels = np.interp(timesteps, np.arange(len(ratios)), ratios)
    if name is not None:
        ends = (ratios[-1], ratios[0]) if family in _MULTISTEP else (levels[0], levels[-1])
        levels = noise_levels(name, steps, *ends, ratios)
        timesteps = _told(family, name, levels, ratios)
    end = 0.0 if family != "deis" else levels[-1] if name else ratios[0]
    if family in _MIDPOINT:
        middles = np.sqrt(levels[:-1] * levels[1:])
        timesteps = np.insert(timesteps, range(1, steps), _timesteps_of(middles, ratios))
        levels = np.insert(levels, range(1, steps), middles)
    if family == "heun":  # every step but the first begins where the one before it is corrected
        timesteps, levels = (np.append(x[:1], x[1:].repeat(2)) for x in (timesteps, levels))
    levels = np.append(levels, end)
    alphas = 1 / np.hypot(levels, 1.0)
    return Schedule(
        timesteps=timesteps,
        alphas=alphas,
        sigmas=np.where(np.isinf(levels), 1.0, np.nan_to_num(levels) * alphas),
        stride=stride,
        alphas_cumprod=cumprod,
        end=1.0 if config.set_alpha_to_one else float(cumprod[0]),
        prediction_type=config.prediction_type,
        spans_all=config.timestep_spacing in ("linspace", "trailing"),
        skip_prk_steps=config.skip_prk_steps,
    )


def _timesteps_of(levels: np.ndarray, ratios: np.ndarray) -> np.ndarray:
    """The fractional timesteps at which the training schedule has these levels."""
    return np.interp(np.log(levels), np.log(ratios), np.arange(len(ratios)))


def _told(family: str, name: str, levels: np.ndarray, ratios: np.ndarray) -> np.ndarray:
    """Which timesteps the model is told at a named schedule's levels: each family rounds in its way, or not."""
    timesteps = _timesteps_of(levels, ratios)
    if family == "dpm2" and name == "karras":
        return timesteps.round()
    if family not in _MULTISTEP:
        return timesteps
    return timesteps.round() if name in ("karras", "ays") else np.floor(timesteps)


def _timesteps(config: ScheduleConfig, family: str, steps: int) -> np.ndarray:
    n = config.num_train_timesteps
    if config.timestep_spacing == "trailing":
        return np.arange(n, 0, -n / steps).round() - 1
    extra = 1 if family in _MULTISTEP else 0
    if config.timestep_spacing == "leading":
        return (np.arange(steps + extra) * (n // (steps + extra)))[::-1][:steps].astype(
            np.float64
        ) + config.steps_offset
    spaced = np.linspace(0, n - 1, steps + extra)[::-1][:steps]
    return spaced.astype(np.float32).astype(np.float64) if family in _FRACTIONAL else spaced.round()


def _pndm_evaluations(timesteps: np.ndarray, stride: int, skip_prk_steps: bool) -> np.ndarray:
    """Where PNDM evaluates the UNet: twice at the second timestep, or four times in each Runge-Kutta step."""
    if skip_prk_steps:
        return np.concatenate([timesteps[:2], timesteps[1:]])
    if len(timesteps) <= PRK_STEPS:
        rule = f"steps must be more than the {PRK_STEPS} Runge-Kutta steps of pndm where skip_prk_steps is off"
        raise ValueError(f"{rule}, got {len(timesteps)}")
    middles = [(a, b + stride // 2, b + stride // 2, b) for a, b in pairwise(timesteps[: PRK_STEPS + 1])]
    return np.concatenate([*middles, timesteps[PRK_STEPS:]])


def _lcm_timesteps(config: ScheduleConfig, steps: int) -> np.ndarray:
    """Every k-th of the timesteps that the model was distilled on (Luo et al. 2023, arXiv:2310.04378)."""
    distilled = config.original_inference_steps
    if steps > distilled:
        raise ValueError(f"steps must be at most original_inference_steps = {distilled} with lcm, got {steps}")
    origin = (np.arange(1, distilled + 1) * (config.num_train_timesteps // distilled) - 1)[::-1]
    return origin[np.floor(np.linspace(0, distilled, steps, endpoint=False)).astype(int)].astype(np.float64)
