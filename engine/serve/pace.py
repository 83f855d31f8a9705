"""How long steps take by their rows: measured while serving, and beforehand to choose how many rows a batch has."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from ..engine import Engine
from ..models.conditioning import Batch, Conditioning
from ..sampling.out_of_memory import batch_rows
from .job import Job

_FADING = 0.95  # what an observation weighs after one more
_WORTH = 0.95  # twice the rows are worth it where a row then costs at most this
_MOST_ROWS = 64
_LONGEST_STEP = 1.0  # seconds; beyond, a batch is wide enough for anybody who waits for a step


class Pace:
    """Seconds of a step as ``a + b * rows``, by least squares over what was observed, the latest weighing most."""

    def __init__(self) -> None:
        self._n = self._rows = self._seconds = self._squares = self._products = 0.0

    def observe(self, rows: int, seconds: float) -> None:
        self._n = _FADING * self._n + 1
        self._rows = _FADING * self._rows + rows
        self._seconds = _FADING * self._seconds + seconds
        self._squares = _FADING * self._squares + rows * rows
        self._products = _FADING * self._products + rows * seconds

    def seconds(self, rows: float) -> float:
        """Of one step; 0 before anything was observed."""
        if not self._n:
            return 0.0
        spread = self._n * self._squares - self._rows**2
        each = (self._n * self._products - self._rows * self._seconds) / spread if spread > 1e-9 else 0.0
        if each <= 0:  # one size was seen, or noise alone
            return self._seconds / self._rows * rows
        return max(0.0, self._seconds / self._n - each * self._rows / self._n) + each * rows


class Budgets:
    """How many rows a batch of each picture size has, and how long its steps take.

    Args:
        sd: the Engine.
        max_rows: of every size; None to find it out for each.
    """

    def __init__(self, sd: Engine, max_rows: int | None) -> None:
        self.sd, self.max_rows = sd, max_rows
        self.rows: dict[tuple[int, int], int] = {}
        self._paces: dict[tuple[int, int], Pace] = {}

    def prepare(self, size: tuple[int, int]) -> None:
        """Choose the rows of pictures of ``size`` (height, width) in pixels, by running the UNet if need be."""
        rows, pace = (self.max_rows, Pace()) if self.max_rows is not None else profile(self.sd, *size)
        self.rows[size], self._paces[size] = rows, pace

    def pace(self, size: tuple[int, int]) -> Pace:
        return self._paces.setdefault(size, Pace())

    def seconds_to_end(self, job: Job, ahead: Sequence[Job]) -> float:
        """How long a new job is likely to take: its steps, and what comes before it if the batches have no room."""
        size, rows = job.request.size, sum(one.rows for one in ahead)
        budget, pace = max(job.rows, self.rows.get(size, 0)), self.pace(size)
        work = sum(one.rows * one.steps_left for one in ahead)
        wait = work / budget * pace.seconds(budget) if rows + job.rows > budget else 0.0
        return wait + job.steps_left * pace.seconds(min(budget, rows + job.rows))


@torch.no_grad()
def profile(sd: Engine, height: int, width: int) -> tuple[int, Pace]:
    """Run the UNet on more and more rows of pictures of ``height`` x ``width`` pixels.

    Returns:
        How many rows make a batch: the fewest beyond which a row costs less by no more than 5 %, within the memory and
        a second a step; and the pace seen.
    """
    size = height // sd.limits.factor, width // sd.limits.factor
    memory = batch_rows(sd.unet, sd.vae, *size)
    fit = _MOST_ROWS if memory is None else min(_MOST_ROWS, memory)
    pace, rows = Pace(), 2
    best = step_seconds(sd, 2, size, pace)
    while 2 * rows <= fit and best < _LONGEST_STEP:
        seconds = step_seconds(sd, 2 * rows, size, pace)
        if seconds > 2 * best * _WORTH:
            break
        best, rows = seconds, 2 * rows
    return rows, pace


def step_seconds(sd: Engine, rows: int, size: tuple[int, int], pace: Pace) -> float:
    """Of a guided step of so many rows at a size (h, w) of latents, the faster of two; ``pace`` sees it too."""
    like, config = sd.unet.conv_in.weight, sd.unet.config
    sample = torch.randn(rows, config.in_channels, *size).to(like)
    context = torch.zeros(rows, sd.text_encoder.max_length, config.cross_attention_dim).to(like)
    condition = Conditioning(Batch(sd.unet.text_kv(context)), sd.unet.time_shifts(torch.zeros(rows).to(like.device)))
    seconds = min(_timed(lambda: sd.unet.denoise(sample, condition), sd.device) for _ in range(2))
    pace.observe(rows, seconds)
    return seconds


def _timed(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return time.perf_counter() - start
