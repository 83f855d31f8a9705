"""Taking turns: a change in the machine's speed then touches all systems alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def take_turns(
    benchmark: Any, ours: Callable[[], Any], peers: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each round by system: ours ("twinstream") by pytest-benchmark, and before it one of each peer's."""
    seconds: dict[str, list[float]] = {name: [] for name in peers}

    def peer_rounds() -> None:
        for name, peer in peers.items():
            start = time.perf_counter()
            peer()
            seconds[name].append(time.perf_counter() - start)

    benchmark.pedantic(ours, setup=peer_rounds, rounds=rounds, warmup_rounds=1)
    own = benchmark.stats.stats.data
    return {"twinstream": own} | {name: each[-len(own) :] for name, each in seconds.items()}


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, as records give them."""
    p10, median, p90 = np.percentile(np.array(seconds) * 1e3, [10, 50, 90])
    return {"median_ms": round(median, 3), "p10_ms": round(p10, 3), "p90_ms": round(p90, 3)}
