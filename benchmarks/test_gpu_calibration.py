"""What the GPU suite begins with: the card is calibrated for the full-size model, and what serves each call is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.conftest import Keep
from benchmarks.systems import FULL_SIZE, full_size_folder
from engine.backends.calibration.calls import words_of
from engine.loading import calibrate_card

_SECONDS = 40.0  # as a load allows


def test_calibration(keep: Keep, request: pytest.FixtureRequest) -> None:
    if request.config.getoption("try_out"):
        pytest.skip("a CPU is not calibrated")
    keep([calibration_record(full_size_folder(FULL_SIZE), torch.device("cuda:0"))])


def calibration_record(folder: Path, device: torch.device) -> dict[str, Any]:
    """Calibrate anew, and say how long it took, how many calls are left, and what serves each and why."""
    loading = {"model": folder, "device": device, "dtype": "float16"}
    done = calibrate_card(loading, seconds=_SECONDS, again=True, progress=False)
    chosen = [
        {"call": words_of(key), "rows": rows, "serves": choice.serves, "why": choice.why, "wrong": choice.wrong}
        for key, rows, choice in done.table
    ]
    for one in chosen:
        print(f"{one['serves']:<10}{one['call']}, {one['rows']} rows: {one['why']}")
    took = dict.fromkeys(("median_ms", "p10_ms", "p90_ms"), round(1e3 * done.seconds, 3))
    about = {"case": "calibration", "system": "twinstream", "dtype": "float16", "rows": 2, "rel_error": None}
    return {**about, **took, "calls": done.asked, "left": done.left, "chosen": chosen}
