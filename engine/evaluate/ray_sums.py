"""Sums of both distances taken in actors of Ray, each with an Engine; only sums come back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..serve.ray_bulk import start_ray
from .sums import Part, Summer


def compute(
    parts: Sequence[Part],
    loading: Mapping[str, Any],
    *,
    address: str | None = None,
    actors: int = 1,
    threads: int | None = 1,
    gpus: float = 0.0,
) -> list[Any]:
    """The parts' sums, in their order. An actor that dies is started again, and its part is taken again.

    Args:
        parts: files they name are on a file system that all of the cluster's machines have.
        loading: arguments of ``engine.load``.
        address, actors, threads, gpus: see ``ray_bulk.paint``.

    Raises:
        RuntimeError: Ray is not installed.
    """
    ray = start_ray(address)
    kind = ray.remote(num_cpus=threads or 1, num_gpus=gpus, max_restarts=-1, max_task_retries=-1)(Summer)
    pool = [kind.remote(dict(loading), threads) for _ in range(min(actors, len(parts)))]
    waiting = [pool[i % len(pool)].take.remote(part) for i, part in enumerate(parts)]
    return ray.get(waiting)
