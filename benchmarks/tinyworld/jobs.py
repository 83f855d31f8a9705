"""Studies side by side, a process each: small models leave threads idle."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch


def side_by_side(study: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], jobs: int) -> list[Any]:
    """``study(*task)`` for every task, ``jobs`` at a time, each with its share of the threads; results in order."""
    n_threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")  # a fork would copy locks of running threads
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (n_threads,)) as pool:
        return list(pool.map(study, *zip(*tasks, strict=True)))
