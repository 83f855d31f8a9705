"""Run the benchmarks and keep their records: ``python -m benchmarks.run [--slow]``.

Writes ``benchmarks/results/<machine>-<date>.json``; ``python -m benchmarks.report`` turns the files into the README's
table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What the numbers were measured on, and with."""
    cpu_info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpu_info.read_text()) if cpu_info.exists() else None
    changes = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=False
    ).stdout
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpu": model.group(1) if model else platform.processor(),
        "cpu_flags": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": "cpu",  # what the systems run on
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "diffusers")},
        "commit": commit + ("+changes" if changes else ""),
        "date": datetime.date.today().isoformat(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slow", action="store_true", help="also full-size random weights: about 20 minutes, 20 GB")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        options = ["benchmarks/test_speed.py", f"--benchmark-json={raw}", "-q", "-m", "slow or not slow"]
        status = pytest.main(options if arguments.slow else options[:-2])
        if not raw.exists() or not raw.stat().st_size:
            return int(status) or 1
        benchmarks = json.loads(raw.read_text())["benchmarks"]
    records = [record | {"peak_memory_bytes": None} for item in benchmarks for record in item["extra_info"]["records"]]
    about = machine()
    name = re.sub(r"[^a-z0-9]+", "-", f"{about['cpu']}-{about['cpu_flags']}".lower()).strip("-")
    path = RESULTS / f"{name}-{about['date']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": about, "records": records}, indent=1) + "\n")
    print(path)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
