"""UNet step, VAE decode and whole pictures, beside diffusers in the same run (pytest-benchmark).

The systems take turns; see ``turns.py``.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.conftest import Keep
from benchmarks.openvino_peer import openvino
from benchmarks.ops import relative_error
from benchmarks.peers import Loaded, diffusers_compile, diffusers_eager
from benchmarks.systems import CONCEPT_SETS, FULL_SIZE, System, full_size_folder, twinstream
from benchmarks.turns import milliseconds, take_turns
from engine.weights.checkpoint import EMBEDDED_MODEL

_CASES = ("guided_step", "vae_decode", "generate_20")
_COMPILED = _CASES[:2]  # which torch.compile runs too; OpenVINO runs all
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
def _folder(model: str) -> Path:
    return EMBEDDED_MODEL if model == "tinyworld" else full_size_folder(FULL_SIZE)


@cache
def _twinstream(model: str, dtype: str) -> System:
    return twinstream(_folder(model), _DTYPES[dtype])


@cache
def _loaded(model: str, dtype: str) -> Loaded:
    return Loaded(_folder(model), _DTYPES[dtype], "cpu")


@cache
def _diffusers(model: str, dtype: str) -> System:
    return diffusers_eager(_folder(model), _DTYPES[dtype], loaded=_loaded(model, dtype))


@cache
def _compiled(model: str, dtype: str) -> System:
    return diffusers_compile(_folder(model), _DTYPES[dtype], loaded=_loaded(model, dtype))


@cache
def _openvino(model: str, dtype: str) -> System:
    return openvino(_folder(model), _DTYPES[dtype])


def _systems(model: str, case: str, dtype: str) -> list[System]:
    """Ours, and the peers that have the case."""
    peers = [_diffusers, *([_compiled] if case in _COMPILED else []), *([_openvino] if case in _CASES else [])]
    return [make(model, dtype) for make in (_twinstream, *peers)]


@cache
def _exact(model: str, case: str) -> torch.Tensor:
    """What diffusers computes in float32."""
    return _diffusers(model, "float32").cases[case]().double()


def _compare(benchmark: Any, keep: Keep, model: str, case: str, dtype: str, rounds: int, rows: int = 2) -> None:
    runs = {system.name: system.cases[case] for system in _systems(model, case, dtype)}
    with torch.no_grad():
        exact = _exact(model, case)
        errors = {name: relative_error(run(), exact) for name, run in runs.items()}
        seconds = take_turns(benchmark, runs.pop("twinstream"), runs, rounds)
    if case.endswith(f"_{CONCEPT_SETS}"):
        case += "_per_concept"
        seconds = {name: [each / CONCEPT_SETS for each in own] for name, own in seconds.items()}
    prefix = {"case": case if model == "tinyworld" else f"{case}_full_size", "dtype": dtype, "rows": rows}
    keep([{**prefix, "system": n, **milliseconds(own), "rel_error": errors[n]} for n, own in seconds.items()])
    assert errors["twinstream"] <= max(_TOLERANCES[dtype], 2 * errors["diffusers_eager"])


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("case", _CASES)
def test_tinyworld(benchmark: Any, keep: Keep, case: str, dtype: str) -> None:
    _compare(benchmark, keep, "tinyworld", case, dtype, rounds=50 if case != "generate_20" else 15)


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("case", _METHOD_ROWS)
def test_tinyworld_methods(benchmark: Any, keep: Keep, case: str, dtype: str) -> None:
    _compare(benchmark, keep, "tinyworld", case, dtype, rounds=30, rows=_METHOD_ROWS[case])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("case", [*_CASES[:2], "dci_mixing_step"])
def test_full_size(benchmark: Any, keep: Keep, case: str, dtype: str) -> None:
    _compare(benchmark, keep, "full_size", case, dtype, rounds=3, rows=_METHOD_ROWS.get(case, 2))
