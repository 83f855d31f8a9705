"""Samplers as tables of numbers.

Every sampler here is linear in what it sees: with the state ``S = (x, history...)``, the noise prediction ``eps`` and
fresh Gaussian noise ``n``,

    S' = A_i S + b_i eps + c_i n,

where the matrix ``A_i`` and the vectors ``b_i`` and ``c_i`` depend on the step ``i`` alone. ``step`` is one pure
function for all of them. The position ``i`` may differ from row to row, so that rows at different steps may share a
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .schedule import Schedule


@dataclass(frozen=True, slots=True)
class Coefficients:
    """What ``step`` reads; entry ``i`` of each tensor belongs to step ``i``.

    Attributes:
        input_scale: (T,) factor from the state's ``x`` to the UNet's input.
        state, model, noise: ``A`` (T, K, K), ``b`` (T, K) and ``c`` (T, K), float32; entry 0 of the state is ``x``.
        keep_scale, keep_noise: (T,) factors on clean latents and unit noise that make the ``x`` after step ``i``, as
            diffusers' ``add_noise`` has it at the next timestep: 1 and 0 after the last. Inpainting reads them.
    """

    input_scale: Tensor
    state: Tensor
    model: Tensor
    noise: Tensor
    keep_scale: Tensor
    keep_noise: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Coefficients:
        """The same with every tensor changed."""
        return Coefficients(*(change(getattr(self, field.name)) for field in fields(self)))


@dataclass(frozen=True, slots=True)
class SamplerTable:
    """One sampler on one schedule.

    Attributes:
        timesteps: (T,) float32, what the UNet is told.
        coefficients: of its T steps.
        start_noise: factor on unit noise that starts a picture from nothing.
        image_scale, image_noise: factors on clean latents and unit noise that start from a picture.
        noise_draws: how many steps draw noise: 0 for a deterministic sampler; LCM's last step draws none.
        clean: (T, 2) float32, factors on ``x`` and on the model's output that make up the clean latents it predicts.
    """

    timesteps: Tensor
    coefficients: Coefficients
    start_noise: float
    image_scale: float
    image_noise: float
    noise_draws: int
    clean: Tensor

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device | str) -> SamplerTable:
        moved = self.coefficients.map(lambda x: x.to(device))
        return replace(self, timesteps=self.timesteps.to(device), coefficients=moved, clean=self.clean.to(device))

    def clean_latents(self, i: int, x: Tensor, history: Tensor, noise: Tensor | None, after: Tensor) -> Tensor:
        """The clean latents (B, 4, h, w) that the model predicted at step ``i``, from what the step made of the state.

        The step is linear in the model's output with a factor that is not 0, so that it follows from ``after``; nothing
        need be kept of the step, or computed unless somebody looks.

        Args:
            i: which step.
            x, history, noise: what ``step`` was given.
            after: the next ``x``.
        """
        coefficients = self.coefficients
        kept = (over_latents(coefficients.state[i, 0, :, None]) * torch.cat([x[None], history])).sum(dim=0)
        if noise is not None:
            kept = kept + coefficients.noise[i, 0] * noise
        output = (after - kept) / coefficients.model[i, 0]
        return self.clean[i, 0] * x + self.clean[i, 1] * output

    def start_history(self, x: Tensor) -> Tensor:
        """The history before the first step: zeros (K - 1, B, 4, h, w)."""
        return x.new_zeros(self.coefficients.state.shape[-1] - 1, *x.shape)


def step(
    coefficients: Coefficients,
    x: Tensor,
    noise_pred: Tensor,
    position: Tensor,
    history: Tensor,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Take one step.

    Args:
        coefficients: the sampler's, on the device of ``x``.
        x: (B, 4, h, w) float32.
        noise_pred: what the UNet predicted for ``x * input_scale``, shape of ``x``.
        position: (B,) int64, each row's step.
        history: (K - 1, B, 4, h, w), from ``start_history`` or the last step.
        noise: fresh unit noise, shape of ``x``; None where no row draws any.

    Returns:
        The next ``x`` and history.
    """
    state = torch.cat([x[None], history])
    # Elementwise, since a matrix product would be rounded to TF32 where a process allows that
    moved = (over_latents(coefficients.state[position].permute(1, 2, 0)) * state).sum(dim=1)
    moved = moved + over_latents(coefficients.model[position].T) * noise_pred.float()
    if noise is not None:
        moved = moved + over_latents(coefficients.noise[position].T) * noise.float()
    return moved[0], moved[1:]


def join_coefficients(tables: Sequence[Coefficients], n_state: int) -> Coefficients:
    """Schedules one after the other, with states of ``n_state`` entries, of which shorter ones leave the last alone."""

    def widened(one: Coefficients) -> Coefficients:
        missing = n_state - one.state.shape[-1]
        state = F.pad(one.state, (0, missing, 0, missing))
        return replace(one, state=state, model=F.pad(one.model, (0, missing)), noise=F.pad(one.noise, (0, missing)))

    parts = [widened(one) for one in tables]
    return Coefficients(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Coefficients)))


def over_latents(factors: Tensor) -> Tensor:
    """Factors (..., B) as (..., B, 1, 1, 1), which multiply latents."""
    return factors[..., None, None, None]


class TableWriter:
    """Collects the rows of a table; ``x0`` and ``eps`` are written as vectors over (state..., model output)."""

    def __init__(self, schedule: Schedule, begin: int, n_history: int, variance_exploding: bool = False) -> None:
        self.schedule, self.begin, self.size = schedule, begin, 1 + n_history
        self.exploding = variance_exploding
        steps = len(schedule.timesteps) - begin
        self.state = np.zeros((steps, self.size, self.size))
        self.model = np.zeros((steps, self.size))
        self.noise = np.zeros((steps, self.size))

    @property
    def steps(self) -> range:
        return range(self.begin, len(self.schedule.timesteps))

    def slot(self, index: int) -> np.ndarray:
        """The basis vector of a state entry."""
        return np.eye(self.size + 1)[index]

    def prediction(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(x0, eps) predicted at step ``i``, for the variance-preserving ``x`` in slot 0."""
        alpha, sigma = self.schedule.alphas[i], self.schedule.sigmas[i]
        x, out = self.slot(0), self.slot(self.size)
        if self.exploding:  # x = x0 + s eps has the scale 1 / alpha of the variance-preserving one
            x = alpha * x
        if self.schedule.prediction_type == "epsilon":
            return (x - sigma * out) / alpha, out
        if self.schedule.prediction_type == "v_prediction":
            return alpha * x - sigma * out, alpha * out + sigma * x
        return out, (x - alpha * out) / sigma

    def write(self, i: int, rows: list[np.ndarray], noise: float | Sequence[float] = 0.0) -> None:
        """Set step ``i``.

        Args:
            i: which.
            rows: each new state entry as a vector over (state..., model output).
            noise: what is added to x of fresh noise, or to each entry.
        """
        matrix = np.stack(rows)
        self.state[i - self.begin], self.model[i - self.begin] = matrix[:, :-1], matrix[:, -1]
        self.noise[i - self.begin] = np.pad(np.atleast_1d(noise), (0, self.size - np.size(noise)))

    def finish(self, noise_draws: int = 0) -> SamplerTable:
        schedule, first = self.schedule, self.begin
        ratios = schedule.sigmas / schedule.alphas
        scale = schedule.alphas[first:-1] if self.exploding else np.ones(len(self.steps))
        keep_scale = np.ones(len(self.steps)) if self.exploding else np.append(schedule.alphas[first + 1 : -1], 1.0)
        keep_noise = np.append((ratios if self.exploding else schedule.sigmas)[first + 1 : -1], 0.0)
        start = 1.0
        if self.exploding:
            start = float(ratios.max() if schedule.spans_all else np.hypot(ratios.max(), 1.0))
        return SamplerTable(
            timesteps=torch.tensor(schedule.timesteps[first:], dtype=torch.float32),
            coefficients=Coefficients(
                input_scale=torch.tensor(scale, dtype=torch.float32),
                state=torch.tensor(self.state, dtype=torch.float32),
                model=torch.tensor(self.model, dtype=torch.float32),
                noise=torch.tensor(self.noise, dtype=torch.float32),
                keep_scale=torch.tensor(keep_scale, dtype=torch.float32),
                keep_noise=torch.tensor(keep_noise, dtype=torch.float32),
            ),
            start_noise=start,
            image_scale=1.0 if self.exploding else float(schedule.alphas[first]),
            image_noise=float(ratios[first] if self.exploding else schedule.sigmas[first]),
            noise_draws=noise_draws,
            clean=torch.tensor(np.stack([self.prediction(i)[0][[0, -1]] for i in self.steps]), dtype=torch.float32),
        )
