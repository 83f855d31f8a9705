"""Run the benchmarks and keep their records: ``python -m benchmarks.run [--slow]``.

Writes ``benchmarks/results/<machine>-<date>.json``, or with ``--slow`` ``<machine>-full-size-<date>.json``;
``python -m benchmarks.report`` turns the files into the README's tables.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.machine import RESULTS, machine
from benchmarks.systems import FULL_SIZE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slow", action="store_true", help="full-size random weights instead: 20 minutes, 20 GB")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        options = ["benchmarks/test_speed.py", "benchmarks/test_ops.py", f"--benchmark-json={raw}", "-q", "-m"]
        status = pytest.main([*options, "slow" if arguments.slow else "not slow"])
        if not raw.exists() or not raw.stat().st_size:
            return int(status) or 1
        benchmarks = json.loads(raw.read_text())["benchmarks"]
    records = [record for item in benchmarks for record in item["extra_info"]["records"]]
    records = [record | {"peak_memory_bytes": _peak(record)} for record in records]
    about = machine()
    name = re.sub(r"[^a-z0-9]+", "-", f"{about['cpu']}-{about['cpu_flags']}".lower()).strip("-")
    size = "full-size-" if arguments.slow else ""
    path = RESULTS / f"{name}-{size}{about['date']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": about, "records": records}, indent=1) + "\n")
    print(path)
    return int(status)


def _peak(record: dict[str, Any]) -> int | None:
    """Peak memory of a process of its own, for guided steps and decoding at full size."""
    case = record["case"].removesuffix("_full_size")
    if case == record["case"] or record["system"] not in ("twinstream", "diffusers_eager"):
        return None
    command = ["-m", "benchmarks.peak_memory", record["system"], str(FULL_SIZE), record["dtype"], case]
    return int(
        subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True).stdout.split()[-1]
    )


if __name__ == "__main__":
    sys.exit(main())
