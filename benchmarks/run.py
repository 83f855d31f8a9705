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

from benchmarks.machine import RESULTS, machine, write_result
from benchmarks.systems import FULL_SIZE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slow", action="store_true", help="full-size random weights instead: 20 minutes, 20 GB")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        options = [f"--benchmark-json={raw}", "-q", "-m", "slow" if arguments.slow else "not slow"]
        command = [sys.executable, "-m", "pytest", "benchmarks/test_speed.py", "benchmarks/test_ops.py", *options]
        # a process of its own, whose models are gone when memory is measured
        status = subprocess.run(command, check=False).returncode
        if not raw.exists() or not raw.stat().st_size:
            return status or 1
        benchmarks = json.loads(raw.read_text())["benchmarks"]
    records = [record for item in benchmarks for record in item["extra_info"]["records"]]
    about = machine()
    name = re.sub(r"[^a-z0-9]+", "-", f"{about['cpu']}-{about['cpu_flags']}".lower()).strip("-")
    size = "full-size-" if arguments.slow else ""
    path = RESULTS / f"{name}-{size}{about['date']}.json"
    for record in records:
        record["peak_memory_bytes"] = None
    write_result(path, about, {"records": records})  # kept, should measuring memory fail
    for record in records:
        record["peak_memory_bytes"] = _peak(record)
    write_result(path, about, {"records": records})
    print(path)
    return status


def _peak(record: dict[str, Any]) -> int | None:
    """Peak memory of a process of its own, for guided steps and decoding at full size."""
    case = record["case"].removesuffix("_full_size")
    is_measured = case in ("guided_step", "vae_decode") and record["system"] in ("twinstream", "diffusers_eager")
    if case == record["case"] or not is_measured:
        return None
    command = ["-m", "benchmarks.peak_memory", record["system"], str(FULL_SIZE), record["dtype"], case]
    return int(
        subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True).stdout.split()[-1]
    )


if __name__ == "__main__":
    sys.exit(main())
