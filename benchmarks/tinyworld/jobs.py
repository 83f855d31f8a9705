"""Studies of several concepts side by side, a process each: small models leave threads idle."""

import argparse
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch


def per_concept(study: Callable[[str, argparse.Namespace], Any], arguments: argparse.Namespace) -> list[Any]:
    """``study(name, arguments)`` for each of ``arguments.concepts``, ``arguments.jobs`` at a time; in order."""
    n_threads = max(1, torch.get_num_threads() // arguments.jobs)
    context = multiprocessing.get_context("spawn")  # a fork would copy locks of running threads
    with ProcessPoolExecutor(arguments.jobs, context, torch.set_num_threads, (n_threads,)) as pool:
        return list(pool.map(study, arguments.concepts, [arguments] * len(arguments.concepts)))
