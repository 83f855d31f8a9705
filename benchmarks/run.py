"""Run the benchmarks and keep their records: ``python -m benchmarks.run [--slow]``.

Writes ``benchmarks/results/<machine>-<date>.json``, or with ``--slow`` ``<machine>-full-size-<date>.json``;
``python -m benchmarks.report`` turns the files into the README's tables.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks.machine import RESULTS, machine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slow", action="store_true", help="full-size random weights instead: 20 minutes, 20 GB")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        options = ["benchmarks/test_speed.py", f"--benchmark-json={raw}", "-q", "-m"]
        status = pytest.main([*options, "slow" if arguments.slow else "not slow"])
        if not raw.exists() or not raw.stat().st_size:
            return int(status) or 1
        benchmarks = json.loads(raw.read_text())["benchmarks"]
    records = [record | {"peak_memory_bytes": None} for item in benchmarks for record in item["extra_info"]["records"]]
    about = machine()
    name = re.sub(r"[^a-z0-9]+", "-", f"{about['cpu']}-{about['cpu_flags']}".lower()).strip("-")
    size = "full-size-" if arguments.slow else ""
    path = RESULTS / f"{name}-{size}{about['date']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": about, "records": records}, indent=1) + "\n")
    print(path)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
