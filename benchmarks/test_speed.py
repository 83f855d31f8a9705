"""UNet step, VAE decode and whole pictures, beside diffusers in the same run (pytest-benchmark).

The systems take turns: before every timed round of ours the peer runs one, timed by hand, so that a change in the
machine's speed touches both alike.
"""

from __future__ import annotations

import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.systems import CONCEPT_SETS, System, diffusers_eager, full_size_folder, twinstream
from engine.checkpoint import EMBEDDED_MODEL

_CASES = ("guided_step", "vae_decode", "generate_20")
_METHOD_ROWS = {
    "infusion_parallel_1": 4,
    "infusion_shared": 3,
    f"infusion_parallel_{CONCEPT_SETS}": 2 + 2 * CONCEPT_SETS,
    "dci_mixing_step": 3,
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The relative difference from diffusers in float32 that still counts as the same result; a bfloat16 result may also
# be twice as far away as diffusers' own
_TOLERANCES = {"float32": 2e-4, "bfloat16": 3e-2}


@cache
def _systems(model: str, dtype: str) -> tuple[System, System]:
    folder = EMBEDDED_MODEL if model == "tinyworld" else full_size_folder(Path(tempfile.gettempdir()) / "sd15-random")
    return twinstream(folder, _DTYPES[dtype]), diffusers_eager(folder, _DTYPES[dtype])


@cache
def _exact(model: str, case: str) -> torch.Tensor:
    """What diffusers computes in float32."""
    return _systems(model, "float32")[1].cases[case]().double()


def _compare(benchmark: Any, model: str, case: str, dtype: str, rounds: int, rows: int = 2) -> None:
    ours, theirs = (system.cases[case] for system in _systems(model, dtype))
    peer_seconds: list[float] = []

    def peer_round() -> None:
        start = time.perf_counter()
        theirs()
        peer_seconds.append(time.perf_counter() - start)

    with torch.no_grad():
        exact = _exact(model, case)
        error, peer_error = (float((run().double() - exact).norm() / exact.norm()) for run in (ours, theirs))
        assert error <= max(_TOLERANCES[dtype], 2 * peer_error)
        benchmark.pedantic(ours, setup=peer_round, rounds=rounds, warmup_rounds=1)
    own = benchmark.stats.stats.data
    if case.endswith(f"_{CONCEPT_SETS}"):
        case += "_per_concept"
        own, peer_seconds = ([each / CONCEPT_SETS for each in seconds] for seconds in (own, peer_seconds))
    prefix = {"case": case if model == "tinyworld" else f"{case}_full_size", "dtype": dtype, "rows": rows}
    benchmark.extra_info["records"] = [
        {**prefix, "system": "twinstream", **_milliseconds(own), "rel_error": error},
        {**prefix, "system": "diffusers_eager", **_milliseconds(peer_seconds[-len(own) :]), "rel_error": peer_error},
    ]


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    p10, median, p90 = np.percentile(np.array(seconds) * 1e3, [10, 50, 90])
    return {"median_ms": round(median, 3), "p10_ms": round(p10, 3), "p90_ms": round(p90, 3)}


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("case", _CASES)
def test_tinyworld(benchmark: Any, case: str, dtype: str) -> None:
    _compare(benchmark, "tinyworld", case, dtype, rounds=50 if case != "generate_20" else 15)


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("case", _METHOD_ROWS)
def test_tinyworld_methods(benchmark: Any, case: str, dtype: str) -> None:
    _compare(benchmark, "tinyworld", case, dtype, rounds=30, rows=_METHOD_ROWS[case])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("case", [*_CASES[:2], "dci_mixing_step"])
def test_full_size(benchmark: Any, case: str, dtype: str) -> None:
    _compare(benchmark, "full_size", case, dtype, rounds=5, rows=_METHOD_ROWS.get(case, 2))
