"""Scheduler fields that would change what a sampler computes: the usual value is taken, any other refused by name."""

import json
import shutil
from pathlib import Path

import pytest

import engine


@pytest.mark.parametrize(
    ("field", "usual", "other"),
    [
        ("euler_at_final", False, True),
        ("thresholding", False, True),
        ("lower_order_final", True, False),
        ("predict_x0", True, False),
        ("solver_order", 2, 3),
        ("timestep_scaling", 10.0, 11.0),
    ],
)
def test_fields_that_change_a_sampler(small_folder: Path, tmp_path: Path, field: str, usual, other) -> None:
    shutil.copytree(small_folder, tmp_path / "model")
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {field: usual}))
    engine.load(tmp_path / "model")
    path.write_text(json.dumps(config | {field: other}))
    with pytest.raises(ValueError, match=f"{field} must be "):
        engine.load(tmp_path / "model")
