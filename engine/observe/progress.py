"""What a caller sees of a run while it goes on: progress, cancellation, and the time of each stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

Callback = Callable[[int, int, Tensor], bool | None]  # step, total, latents -> False cancels


class Steps:
    """Progress and cancellation after each step."""

    def __init__(self, callback: Callback | None, total: int, bar: tqdm) -> None:
        self.callback, self.total, self.bar = callback, total, bar
        self.cancelled = False

    def __call__(self, i: int, latents: Tensor) -> bool:
        self.bar.update()
        answer = None if self.callback is None else self.callback(i, self.total, latents)
        self.cancelled = answer is not None and not answer
        return not self.cancelled


class StageClock:
    """Wall time per stage; on a GPU a stage ends when its work is done."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stages, self.start = device, {}, time.perf_counter()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # another may be capturing
        self.stages[stage] = time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        return self.stages | {"total": time.perf_counter() - self.start}
