"""Samplers that draw fresh noise on the way: each writes the table ``(A, b, c)`` of ``table.py``."""

from __future__ import annotations

import numpy as np

from .schedule import Schedule
from .table import SamplerTable, TableWriter

_LCM_SIGMA_DATA = 0.5
_LCM_TIMESTEP_SCALING = 10.0


def euler_ancestral(schedule: Schedule, begin: int) -> SamplerTable:
    """Euler steps to below the next noise level, and fresh noise up to it (k-diffusion's ancestral sampling)."""
    table = TableWriter(schedule, begin, n_history=0, variance_exploding=True)
    ratios = schedule.sigmas / schedule.alphas
    for i in table.steps:
        x0, _ = table.prediction(i)
        now, after = ratios[i], ratios[i + 1]
        up = np.sqrt(after**2 * (now**2 - after**2) / now**2)
        down = np.sqrt(after**2 - up**2)
        table.write(i, [table.slot(0) + (down - now) * (table.slot(0) - x0) / now], up)
    return table.finish(len(table.steps))


def dpmpp_2m_sde(schedule: Schedule, begin: int) -> SamplerTable:
    """SDE-DPM-Solver++(2M), midpoint (Lu et al. 2022, arXiv:2211.01095, appendix D); first order at both ends."""
    table = TableWriter(schedule, begin, n_history=1)  # the last x0
    alphas, sigmas, ratios = schedule.alphas, schedule.sigmas, schedule.sigmas / schedule.alphas
    for i in table.steps:
        x0, direction = midpoint(table, i)
        decay = ratios[i + 1] / ratios[i]  # exp(-h)
        x = sigmas[i + 1] / sigmas[i] * decay * table.slot(0) + alphas[i + 1] * (1 - decay**2) * direction
        table.write(i, [x, x0], sigmas[i + 1] * np.sqrt(1 - decay**2))
    return table.finish(len(table.steps))


def midpoint(table: TableWriter, i: int) -> tuple[np.ndarray, np.ndarray]:
    """The x0 predicted at step ``i`` of a DPM-Solver++(2M), whose slot 1 has the last one, and its midpoint.

    At both ends, where there is no last one or no noise is left, the midpoint is the prediction itself.
    """
    schedule, (x0, _) = table.schedule, table.prediction(i)
    if i == table.begin or i == len(schedule.timesteps) - 1:
        return x0, x0
    ratios = schedule.sigmas / schedule.alphas
    h, h_last = np.log(ratios[i] / ratios[i + 1]), np.log(ratios[i - 1] / ratios[i])
    return x0, x0 + 0.5 * h / h_last * (x0 - table.slot(1))


def dpmpp_sde(schedule: Schedule, begin: int) -> SamplerTable:
    """SDE-DPM-Solver++(2S) as k-diffusion runs it: to the geometric mean of two levels, then all the way with its x0.

    Both parts of a step see one Brownian path, whose time is the noise level: the second part's noise is made of the
    first one's, which is kept, and of fresh noise for the rest of the way.
    """
    table = TableWriter(schedule, begin, n_history=2, variance_exploding=True)  # x where the step began, its noise
    ratios, last = schedule.sigmas / schedule.alphas, len(schedule.timesteps) - 1
    none = np.zeros(table.size + 1)
    for i in table.steps:
        x0, _ = table.prediction(i)
        first = i % 2 == 0
        start, now, after = table.slot(0 if first else 1), ratios[i if first else i - 1], ratios[i + 1]
        if i == last:
            table.write(i, [x0, none, none])
            continue
        up = after * np.sqrt(1 - (after / now) ** 2)
        down = np.sqrt(after**2 - up**2)
        x = down / now * start + (1 - down / now) * x0
        if first:
            table.write(i, [x, start, none], [up, 0.0, 1.0])
        else:
            kept, fresh = np.sqrt((now - ratios[i]) / (now - after)), np.sqrt((ratios[i] - after) / (now - after))
            table.write(i, [x + up * kept * table.slot(2), none, none], up * fresh)
    return table.finish(last - begin)


def lcm(schedule: Schedule, begin: int) -> SamplerTable:
    """Multistep consistency sampling (Luo et al. 2023, arXiv:2310.04378, algorithm 3)."""
    table = TableWriter(schedule, begin, n_history=0)
    final = len(schedule.timesteps) - 1
    for i in table.steps:
        x0, _ = table.prediction(i)
        scaled = schedule.timesteps[i] * _LCM_TIMESTEP_SCALING
        skip = _LCM_SIGMA_DATA**2 / (scaled**2 + _LCM_SIGMA_DATA**2)
        out = scaled / np.hypot(scaled, _LCM_SIGMA_DATA)
        denoised = out * x0 + skip * table.slot(0)
        alpha, sigma = (1.0, 0.0) if i == final else (schedule.alphas[i + 1], schedule.sigmas[i + 1])
        table.write(i, [alpha * denoised], sigma)
    return table.finish(len(table.steps) - 1)


def tcd(schedule: Schedule, begin: int, eta: float) -> SamplerTable:
    """Strategic stochastic sampling of trajectory consistency (Zheng et al. 2024, arXiv:2402.19159, algorithm 4).

    Each step goes beyond the next timestep, to ``(1 - eta)`` of it, and back to it by fresh noise.
    """
    table = TableWriter(schedule, begin, n_history=0)
    after = np.append(schedule.timesteps[1:], 0)
    for i in table.steps:
        x0, eps = table.prediction(i)
        (alpha, sigma), (alpha_next, _) = schedule.level(np.floor((1 - eta) * after[i])), schedule.level(after[i])
        share = alpha_next / alpha if i < len(after) - 1 else 1.0
        table.write(i, [share * (alpha * x0 + sigma * eps)], np.sqrt(1 - share**2))
    return table.finish(len(table.steps) - 1 if eta else 0)
