"""The samplers: each writes the table ``(A, b, c)`` of ``table.py`` for a schedule, in its paper's symbols."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..models.config import ScheduleConfig
from .schedule import BY_LEVEL, PRK_STEPS, Schedule, make_schedule
from .stochastic import dpmpp_2m_sde, dpmpp_sde, euler_ancestral, lcm, midpoint, tcd
from .table import SamplerTable, TableWriter


def _ddim(schedule: Schedule, begin: int, eta: float) -> SamplerTable:
    """DDIM (Song et al. 2021, arXiv:2010.02502, eq. 12)."""
    return _posterior(schedule, begin, eta, schedule.timesteps - schedule.stride)


def _ddpm(schedule: Schedule, begin: int) -> SamplerTable:
    """Ancestral sampling (Ho et al. 2020, arXiv:2006.11239, algorithm 2, the smaller variance): DDIM with eta 1."""
    return _posterior(replace(schedule, end=1.0), begin, 1.0, np.append(schedule.timesteps[1:], -1))


def _posterior(schedule: Schedule, begin: int, eta: float, targets: np.ndarray) -> SamplerTable:
    """From each timestep to its target, with a share ``eta`` of the posterior's noise."""
    table = TableWriter(schedule, begin, n_history=0)
    for i in table.steps:
        x0, eps = table.prediction(i)
        alpha, alpha_next = schedule.alphas[i] ** 2, schedule.level(targets[i])[0] ** 2
        sigma = eta * np.sqrt((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next))
        table.write(i, [np.sqrt(alpha_next) * x0 + np.sqrt(max(0.0, 1 - alpha_next - sigma**2)) * eps], sigma)
    return table.finish(len(table.steps) if eta else 0)


_ADAMS_BASHFORTH = (  # weights of this and earlier predictions, by how many there are
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
_RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


def _pndm(schedule: Schedule, begin: int) -> SamplerTable:
    """PNDM (Liu et al. 2022, arXiv:2202.09778): linear multistep predictions in DDIM's transfer between levels.

    It starts with Runge-Kutta steps, or, as SD v1.5 does, with one step taken twice, the second time with the mean of
    the predictions at both of its ends.
    """
    if schedule.prediction_type == "sample":
        raise ValueError("pndm needs a model that predicts epsilon or v, got prediction_type='sample'")
    if begin and not schedule.skip_prk_steps:
        rule = "pndm starts from a picture only on a schedule with skip_prk_steps"
        raise ValueError(f"{rule}, which this model's lacks; use another sampler, such as ddim")
    n_history = 3 if schedule.skip_prk_steps else 5  # predictions; then a Runge-Kutta step's sum and start
    table = TableWriter(schedule, begin, n_history)
    times, stride = schedule.timesteps, schedule.stride
    x, out, none = table.slot(0), table.slot(table.size), np.zeros(table.size + 1)
    earlier = [table.slot(k) for k in (1, 2, 3)]

    def transfer(start: np.ndarray, prediction: np.ndarray, origin: float, target: float) -> np.ndarray:
        (alpha, sigma), (alpha_next, sigma_next) = schedule.level(origin), schedule.level(target)
        eps = alpha * prediction + sigma * start if schedule.prediction_type == "v_prediction" else prediction
        return alpha_next / alpha * (start - sigma * eps) + sigma_next * eps

    n_prk = 0 if schedule.skip_prk_steps else 4 * PRK_STEPS
    for i in table.steps:
        n = i - begin
        if n < n_prk:
            part, origin = n % 4, times[n - n % 4]
            total, start = (none, x) if part == 0 else (table.slot(4), table.slot(5))
            total = total + _RUNGE_KUTTA[part] * out
            kept = [out, *earlier[:2]] if part == 0 else earlier
            target = times[i] if n % 2 else times[i] - stride // 2
            after = transfer(start, total if part == 3 else out, origin, target)
            table.write(i, [after, *kept, total, start])
            continue
        if schedule.skip_prk_steps and n == 1:  # the first step once more, from its start, which stands in slot 2
            after = transfer(table.slot(2), (out + earlier[0]) / 2, times[i] + stride, times[i])
            table.write(i, [after, earlier[0], none, none])
            continue
        weights = _ADAMS_BASHFORTH[3 if n_prk else min(3, max(0, n - 1))]
        prediction = np.sum([w * e for w, e in zip(weights, [out, *earlier], strict=False)], axis=0)
        kept = [out, x, none] if n == 0 else [out, *earlier[:2]]
        table.write(i, [transfer(x, prediction, times[i], times[i] - stride), *kept, *[none] * (table.size - 4)])
    return table.finish()


def _euler(schedule: Schedule, begin: int) -> SamplerTable:
    """Euler steps of the probability-flow ODE (Karras et al. 2022, arXiv:2206.00364, algorithm 1)."""
    table = TableWriter(schedule, begin, n_history=0, variance_exploding=True)
    ratios = schedule.sigmas / schedule.alphas
    for i in table.steps:
        x0, _ = table.prediction(i)
        derivative = (table.slot(0) - x0) / ratios[i]
        table.write(i, [table.slot(0) + (ratios[i + 1] - ratios[i]) * derivative])
    return table.finish()


def _heun(schedule: Schedule, begin: int) -> SamplerTable:
    """Heun's second-order steps (Karras et al. 2022, algorithm 1); the last, to no noise, is Euler's."""
    table = TableWriter(schedule, begin, n_history=2, variance_exploding=True)  # x and slope where the step began
    ratios = schedule.sigmas / schedule.alphas
    none = np.zeros(table.size + 1)
    for i in table.steps:
        x0, _ = table.prediction(i)
        slope = (table.slot(0) - x0) / ratios[i]
        if i % 2 == 0:  # predict
            table.write(i, [table.slot(0) + (ratios[i + 1] - ratios[i]) * slope, table.slot(0), slope])
        else:  # correct, from where the step began
            mean = (table.slot(2) + slope) / 2
            table.write(i, [table.slot(1) + (ratios[i] - ratios[i - 1]) * mean, none, none])
    return table.finish()


def _dpm2(schedule: Schedule, begin: int) -> SamplerTable:
    """DPM-Solver-2 in the noise level (Karras et al. 2022, table 1): the slope is taken at the geometric mean."""
    table = TableWriter(schedule, begin, n_history=1, variance_exploding=True)  # x where the step began
    ratios = schedule.sigmas / schedule.alphas
    for i in table.steps:
        x0, _ = table.prediction(i)
        slope = (table.slot(0) - x0) / ratios[i]
        if i % 2 == 0:  # to the middle, or at last to no noise
            table.write(i, [table.slot(0) + (ratios[i + 1] - ratios[i]) * slope, table.slot(0)])
        else:
            table.write(i, [table.slot(1) + (ratios[i + 1] - ratios[i - 1]) * slope, np.zeros(table.size + 1)])
    return table.finish()


def _dpmpp_2m(schedule: Schedule, begin: int) -> SamplerTable:
    """DPM-Solver++(2M), midpoint (Lu et al. 2022, arXiv:2211.01095, algorithm 2); first order at both ends."""
    table = TableWriter(schedule, begin, n_history=1)  # the last x0
    alphas, sigmas, ratios = schedule.alphas, schedule.sigmas, schedule.sigmas / schedule.alphas
    for i in table.steps:
        x0, direction = midpoint(table, i)
        decay = ratios[i + 1] / ratios[i]  # exp(-h)
        table.write(i, [sigmas[i + 1] / sigmas[i] * table.slot(0) + alphas[i + 1] * (1 - decay) * direction, x0])
    return table.finish()


def _unipc(schedule: Schedule, begin: int) -> SamplerTable:
    """UniPC-2 with B(h) = expm1(h) on x0 predictions (Zhao et al. 2023, arXiv:2302.04867, algorithms 5 to 8)."""
    table = TableWriter(schedule, begin, n_history=3)  # the last corrected x, the last x0, the x0 before it
    total, order = len(schedule.timesteps), 0
    for i in table.steps:
        x0, _ = table.prediction(i)
        x = table.slot(0) if i == begin else _unipc_corrected(table, i, order)
        order = min(2, total - i, i - begin + 1)
        table.write(i, [_unipc_predicted(table, i, order, x), x, x0, table.slot(2)])
    return table.finish()


def _unipc_corrected(table: TableWriter, i: int, order: int) -> np.ndarray:
    """``x`` at level ``i``, which was predicted from the level before, corrected with the x0 found at it."""
    schedule, (x0, _), last, x0_last, x0_older = table.schedule, table.prediction(i), *map(table.slot, (1, 2, 3))
    h = schedule.log_snr[i] - schedule.log_snr[i - 1]
    gain = schedule.alphas[i] * np.expm1(-h)
    base = schedule.sigmas[i] / schedule.sigmas[i - 1] * last - gain * x0_last
    if order < 2:
        return base - gain * 0.5 * (x0 - x0_last)
    r = (schedule.log_snr[i - 2] - schedule.log_snr[i - 1]) / h
    older, newer = _unipc_weights(h, r)
    return base - gain * (older * (x0_older - x0_last) / r + newer * (x0 - x0_last))


def _unipc_predicted(table: TableWriter, i: int, order: int, x: np.ndarray) -> np.ndarray:
    """``x`` at the level after ``i``."""
    schedule, (x0, _), x0_last = table.schedule, table.prediction(i), table.slot(2)
    h = schedule.log_snr[i + 1] - schedule.log_snr[i]
    gain = schedule.alphas[i + 1] * np.expm1(-h)
    after = schedule.sigmas[i + 1] / schedule.sigmas[i] * x - gain * x0
    if order < 2:
        return after
    r = (schedule.log_snr[i - 1] - schedule.log_snr[i]) / h
    return after - gain * 0.5 * (x0_last - x0) / r


def _unipc_weights(h: float, r: float) -> np.ndarray:
    """The corrector's two weights: the solution of R(h) a = g(h) / B(h) in the paper's equation 5."""
    phi = [np.expm1(-h) / -h - 1]
    phi.append(phi[0] / -h - 0.5)
    b = np.array([phi[0], 2 * phi[1]]) / np.expm1(-h)
    return np.linalg.solve(np.array([[1.0, 1.0], [r, 1.0]]), b)


_DEIS_LOWER_ORDER = 15  # below so many steps the last is of first order


def _deis(schedule: Schedule, begin: int) -> SamplerTable:
    """DEIS of second order, polynomials in log rho (Zhang and Chen 2023, arXiv:2204.13902), rho = sigma / alpha."""
    table = TableWriter(schedule, begin, n_history=1)  # the last noise prediction
    alphas, rho = schedule.alphas, schedule.sigmas / schedule.alphas
    last = len(schedule.timesteps) - 1

    def integral(own: float, other: float, start: float, end: float) -> float:
        """Of the polynomial in log rho that is 1 at ``own`` and 0 at ``other``."""
        value, value_before = (t * (np.log(t / other) - 1) for t in (end, start))
        return (value - value_before) / np.log(own / other)

    for i in table.steps:
        _, eps = table.prediction(i)
        change = (rho[i + 1] - rho[i]) * eps
        if i > begin and not (i == last and last + 1 < _DEIS_LOWER_ORDER):
            change = integral(rho[i], rho[i - 1], rho[i], rho[i + 1]) * eps
            change = change + integral(rho[i - 1], rho[i], rho[i], rho[i + 1]) * table.slot(1)
        table.write(i, [alphas[i + 1] * (table.slot(0) / alphas[i] + change), eps])
    return table.finish()


@dataclass(frozen=True, slots=True)
class Sampler:
    """How a sampler's table is written.

    Attributes:
        family: who lays out the timesteps; see ``make_schedule``.
        write: writes the table from a schedule and the first evaluation.
        timestep_spacing: what its diffusers class takes where a model's schedule is silent.
        set_alpha_to_one: likewise; it matters to ddim and pndm alone.
        evaluations_per_step: of the UNet.
        least_signal: what its diffusers class takes for an alpha-bar of 0 at the last timestep; None if it knows none.
    """

    family: str
    write: Callable[..., SamplerTable]
    timestep_spacing: str = "linspace"
    set_alpha_to_one: bool = True
    evaluations_per_step: int = 1
    least_signal: float | None = None

    @property
    def defaults(self) -> dict[str, Any]:
        """Fields of a ``ScheduleConfig`` that may be silent."""
        return {name: getattr(self, name) for name in ("timestep_spacing", "set_alpha_to_one")}


_LEAST_SIGNAL = 2.0**-24  # for samplers that divide by it

SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler("ddim", _ddim, "leading", least_signal=0.0),
    "pndm": Sampler("pndm", _pndm, "leading", set_alpha_to_one=False),
    "euler": Sampler("euler", _euler, least_signal=_LEAST_SIGNAL),
    "euler_ancestral": Sampler("euler_ancestral", euler_ancestral, least_signal=_LEAST_SIGNAL),
    "heun": Sampler("heun", _heun, evaluations_per_step=2),
    "dpm2": Sampler("dpm2", _dpm2, evaluations_per_step=2),
    "dpmpp_2m": Sampler("multistep", _dpmpp_2m, least_signal=_LEAST_SIGNAL),
    "dpmpp_2m_karras": Sampler("multistep", _dpmpp_2m, least_signal=_LEAST_SIGNAL),
    "dpmpp_2m_sde": Sampler("multistep", dpmpp_2m_sde, least_signal=_LEAST_SIGNAL),
    "dpmpp_sde": Sampler("dpmpp_sde", dpmpp_sde, evaluations_per_step=2),
    "deis": Sampler("deis", _deis),
    "unipc": Sampler("multistep", _unipc, least_signal=_LEAST_SIGNAL),
    "ddpm": Sampler("ddim", _ddpm, "leading", least_signal=0.0),
    "lcm": Sampler("lcm", lcm, "leading", least_signal=0.0),
    "tcd": Sampler("lcm", tcd, "leading", least_signal=0.0),
}
WITH_ETA = ("ddim", "tcd")


def make_table(
    name: str, config: ScheduleConfig, steps: int, eta: float = 0.0, begin: int = 0, schedule: str | None = None
) -> SamplerTable:
    """Write the table of sampler ``name``.

    Args:
        name: one of ``SAMPLERS``.
        config: the model's training schedule.
        steps: length of the whole schedule.
        eta: share of fresh noise of those ``WITH_ETA``, 0 (deterministic) to 1; TCD's paper calls it gamma.
        begin: first step taken; image-to-image skips the ones before it.
        schedule: one of ``SCHEDULES``; where not given, the config's.

    Raises:
        ValueError: the sampler does not go with one of the others, or with the model.
    """
    if eta and name not in WITH_ETA:
        raise ValueError(f"eta belongs to {' and '.join(WITH_ETA)} alone, got eta={eta} with sampler={name!r}")
    sampler, schedule, signal = SAMPLERS[name], _schedule(name, schedule), _least_signal(name, config)
    said = {key: default for key, default in sampler.defaults.items() if getattr(config, key) is None}
    laid_out = make_schedule(replace(config, **said), sampler.family, steps, schedule, signal)
    options = {"eta": eta} if name in WITH_ETA else {}
    return sampler.write(laid_out, sampler.evaluations_per_step * begin, **options)


def _schedule(name: str, schedule: str | None) -> str | None:
    """The schedule that a sampler's name and the argument ask for."""
    if name.endswith("_karras"):
        if schedule not in (None, "karras"):
            raise ValueError(f"sampler {name!r} has the schedule 'karras', got schedule={schedule!r}; use another one")
        return "karras"
    family = SAMPLERS[name].family
    if schedule is not None and family not in BY_LEVEL and (schedule != "sgm_uniform" or family == "lcm"):
        raise ValueError(f"schedule must be one that the sampler takes, got {schedule!r} with sampler={name!r}")
    return schedule


def _least_signal(name: str, config: ScheduleConfig) -> float:
    signal = SAMPLERS[name].least_signal
    if config.rescale_betas_zero_snr and signal is None:
        known = ", ".join(other for other, sampler in SAMPLERS.items() if sampler.least_signal is not None)
        raise ValueError(f"sampler must be one of {known} for a model of zero terminal SNR, got {name!r}")
    return signal or 0.0
