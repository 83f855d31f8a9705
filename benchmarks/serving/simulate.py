"""The scheduler's policy without an Engine, a step as the unit of time: ``python -m benchmarks.serving.simulate``.

Prints how long a million Poisson arrivals waited for their first step, by load.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.serve.policy import Candidate, catch_up, choose


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that comes before step ``step`` of the simulation, of so many rows at each of ``steps`` steps."""

    step: float
    client: str
    rows: int
    steps: int


def poisson(n: int, load: float, max_rows: int, seed: int, clients: int = 8) -> list[Arrival]:
    """Arrivals of mixed kinds and step counts that keep ``load`` of the rows busy."""
    generator = np.random.default_rng(seed)
    rows, steps = generator.choice([2, 2, 3, 4], n), generator.choice([4, 8, 20, 30, 50], n)
    work = float(np.mean(rows * steps))
    times = np.cumsum(generator.exponential(work / (load * max_rows), n))
    who = generator.integers(0, clients, n)
    return [
        Arrival(float(t), f"client-{c}", int(r), int(s)) for t, c, r, s in zip(times, who, rows, steps, strict=True)
    ]


def simulate(arrivals: Sequence[Arrival], max_rows: int) -> list[float]:
    """Steps that each arrival, which come in order, waited for its first."""
    now, coming = 0.0, 0
    waiting: list[int] = []
    left = [one.steps for one in arrivals]
    waits = [-1.0] * len(arrivals)
    served: dict[str, float] = {}
    while coming < len(arrivals) or waiting:
        if not waiting:
            now = max(now, arrivals[coming].step)
        while coming < len(arrivals) and arrivals[coming].step <= now:
            client = arrivals[coming].client
            served[client] = catch_up(served, client, [arrivals[i].client for i in waiting])
            waiting.append(coming)
            coming += 1
        candidates = [Candidate(arrivals[i].client, 0, arrivals[i].rows) for i in waiting]
        for place in choose(candidates, served, lambda _: max_rows):
            i = waiting[place]
            served[arrivals[i].client] += arrivals[i].rows
            waits[i] = max(waits[i], now - arrivals[i].step) if waits[i] < 0 else waits[i]
            left[i] -= 1
        waiting = [i for i in waiting if left[i]]
        now += 1
    return waits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arrivals", type=int, default=1_000_000)
    parser.add_argument("--max-rows", type=int, default=16)
    arguments = parser.parse_args()
    for load in (0.3, 0.5, 0.7, 0.9):
        start = time.perf_counter()
        waits = simulate(poisson(arguments.arrivals, load, arguments.max_rows, seed=0), arguments.max_rows)
        p50, p95, p99 = np.percentile(waits, [50, 95, 99])
        outcomes = Counter(wait >= 0 for wait in waits)
        print(
            f"load {load:.1f}: {outcomes[True]} of {len(waits)} served; steps waited: p50 {p50:.1f}, p95 {p95:.1f}, "
            f"p99 {p99:.1f}, most {max(waits):.0f}; {time.perf_counter() - start:.0f} s"
        )


if __name__ == "__main__":
    main()
