"""The README's tables come from the committed result files, and from nothing else."""

import json
from pathlib import Path

import pytest

from benchmarks import report


def test_readme_is_current() -> None:
    text = report.README.read_text()
    assert report._SECTION.sub(lambda _: report.tables(), text) == text, "run python -m benchmarks.report"


def test_tables_follow_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.tables() == "Not measured.\n"
    about = {
        "cpu": "Some CPU",
        "cpu_flags": "AVX2",
        "threads": 2,
        "commit": "0123456789abcdef",
        "versions": {"torch": "2.13.0", "diffusers": "0.42.1"},
    }
    record = {"case": "guided_step", "dtype": "float32", "rows": 2, "p10_ms": 1.0, "p90_ms": 9.0, "rel_error": 1e-7}
    record["peak_memory_bytes"] = 2 * 10**9
    records = [
        record | {"system": "twinstream", "median_ms": 4.0},
        record | {"system": "diffusers_eager", "median_ms": 6.0},
        record | {"case": "geglu", "system": "twinstream", "median_ms": 1.0, "bytes": 5e6},
        record | {"case": "geglu", "system": "torch_eager", "median_ms": 2.0, "bytes": 5e6},
        record | {"case": "copy", "system": "ceiling", "median_ms": 1.0, "bytes": 2e7},
    ]
    (tmp_path / "a.json").write_text(json.dumps({"machine": about, "records": records}))
    tables = report.tables()
    assert (
        "| guided_step | float32 | 4.0 (1.0 to 9.0) | 6.0 (1.0 to 9.0) | 1.50x |  | 1.0e-07 (1.0e-07) | 2.0 (2.0) |"
        in tables
    )
    assert "| geglu | float32 | 1.0 (1.0 to 9.0) | 2.0 (1.0 to 9.0) | 2.00x | 5 GB/s | 25 % of 20 | 1.0e-07" in tables
    assert "commit 012345678 " in tables
