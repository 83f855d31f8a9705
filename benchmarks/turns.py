"""Taking turns: a change in the machine's speed then touches all systems alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch


def take_turns(
    benchmark: Any,
    ours: Callable[[], Any],
    peers: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: str = "cpu",
    warmup_rounds: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each round by system: ours ("twinstream"), which pytest-benchmark calls, and before it each peer once.

    On a GPU they are between two events around the call: of the work and of the gaps in it, not of waiting for it.
    """
    runs = {**peers, "twinstream": ours}
    seconds: dict[str, list[float]] = {name: [] for name in runs}

    def turn(name: str) -> None:
        seconds[name].append(seconds_of(runs[name], device))

    def peers_turn() -> None:
        for name in peers:
            turn(name)

    benchmark.pedantic(turn, args=("twinstream",), setup=peers_turn, rounds=rounds, warmup_rounds=warmup_rounds)
    return {name: each[-rounds:] for name, each in seconds.items()}


def seconds_of(run: Callable[[], Any], device: str) -> float:
    """How long one call takes."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, as records give them."""
    p10, median, p90 = np.percentile(np.array(seconds) * 1e3, [10, 50, 90])
    return {"median_ms": round(median, 3), "p10_ms": round(p10, 3), "p90_ms": round(p90, 3)}
