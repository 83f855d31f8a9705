"""Whether another commit made plain pictures slower: ``python -m benchmarks.before_after --before FOLDER``.

``FOLDER`` is a checkout of the earlier commit with its native kernels built. Processes of both take turns, each of
which draws with the embedded model at the library's defaults but for 20 steps; so does what asks for nothing new pay
for what was added. Writes ``benchmarks/results/before-after-<date>.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import RESULTS, machine, write_result

ROOT = Path(__file__).parent.parent
# What both commits can run; times in seconds, after one picture to warm up
_WORK = """
import json, sys, time
import engine
dtype, repeats = sys.argv[1], int(sys.argv[2])
start = time.perf_counter()
sd = engine.load(dtype=dtype)
loading = time.perf_counter() - start
def draw(count):
    start = time.perf_counter()
    sd.generate(["a photo of a cat on a beach"] * count, seed=list(range(count)), steps=20, progress=False)
    return time.perf_counter() - start
times = {"load": [loading]}
for count in (1, 4):
    draw(count)
    times[f"generate_{count}"] = [draw(count) for _ in range(repeats)]
print(json.dumps(times))
"""


def measure(folder: Path, dtype: str, repeats: int) -> dict[str, list[float]]:
    """Seconds by case, in a process of its own whose engine is that of ``folder``."""
    command = [sys.executable, "-W", "ignore", "-c", _WORK, dtype, str(repeats)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def take_turns(folders: dict[str, Path], dtype: str, rounds: int, repeats: int) -> list[dict[str, Any]]:
    """Records by case and side; a round has a process of each side."""
    seen: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds):
        for side in folders if turn % 2 else reversed(folders):
            for case, seconds in measure(folders[side], dtype, repeats).items():
                seen.setdefault((case, side), []).extend(seconds)
    records = []
    for (case, side), seconds in sorted(seen.items()):
        low, median, high = (round(1000 * float(one), 2) for one in np.percentile(seconds, [10, 50, 90]))
        records.append({"case": case, "dtype": dtype, "side": side, "median_ms": median, "p10_ms": low, "p90_ms": high})
    return records


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the earlier commit")
    parser.add_argument("--rounds", type=int, default=6, help="processes of each side (default: 6)")
    parser.add_argument("--repeats", type=int, default=5, help="pictures of each process and case (default: 5)")
    parser.add_argument("--result", type=Path, default=RESULTS / f"before-after-{date.today().isoformat()}.json")
    arguments = parser.parse_args(argv)
    folders = {"before": arguments.before.resolve(), "after": ROOT}
    records = []
    for dtype in ("float32", "bfloat16"):
        records += take_turns(folders, dtype, arguments.rounds, arguments.repeats)
    for record in records:
        print(record)
    head = ["git", "-C", str(folders["before"]), "rev-parse", "HEAD"]
    before = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    write_result(arguments.result, machine(), {"before": before, "before_after": records})


if __name__ == "__main__":
    main()
