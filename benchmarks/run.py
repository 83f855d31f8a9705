"""Run the benchmarks and keep their records: ``python -m benchmarks.run [--slow | --gpu]``.

Writes ``benchmarks/results/<machine>-<date>.json`` (with ``--slow`` ``<machine>-full-size-<date>.json``) after every
group of cases; what is there from the same commit and day is not run again, so a run that was stopped goes on.
``python -m benchmarks.report`` turns the files into the README's tables.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import RESULTS, machine, write_result
from benchmarks.systems import FULL_SIZE, full_size_folder


@dataclass(frozen=True, slots=True)
class Group:
    """Cases that are run by one process: pytest's arguments, and after how long it is stopped."""

    name: str
    arguments: tuple[str, ...]
    limit_s: int | None = None


_GPU = "benchmarks/test_gpu.py"
_GROUPS = {
    "cpu": (
        Group("speed", ("benchmarks/test_speed.py", "-m", "not slow")),
        Group("ops", ("benchmarks/test_ops.py",)),
    ),
    "slow": tuple(  # of one dtype at a time: the systems' weights are in memory together
        Group(f"full_size_{dtype}", ("benchmarks/test_speed.py", "-m", "slow", "-k", dtype))
        for dtype in ("float32", "bfloat16")
    ),
    "gpu": (  # how long it takes is not measured
        Group("calibration", ("benchmarks/test_gpu_calibration.py", "-s", "-k", "test_calibration"), 55),
        Group("kernels", (_GPU, "-k", "test_kernels"), 90),
        Group("steps", (_GPU, "-k", "test_steps"), 150),
        Group("pictures", (_GPU, "-k", "test_pictures"), 115),
        Group("start", (_GPU, "-k", "test_start"), 40),
        Group("compiled", (_GPU, "-k", "test_compiled"), 120),
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--slow", action="store_true", help="full-size random weights on the CPU: 20 minutes, 20 GB")
    which.add_argument("--gpu", action="store_true", help="full-size random weights on the GPU")
    parser.add_argument("--groups", nargs="*", help="only these groups, again if they are there")
    arguments = parser.parse_args()
    kind = "gpu" if arguments.gpu else "slow" if arguments.slow else "cpu"
    groups = {group.name: group for group in _GROUPS[kind]}
    if unknown := set(arguments.groups or ()) - groups.keys():
        parser.error(f"groups must be among {', '.join(groups)}, got {', '.join(sorted(unknown))}")
    if kind == "gpu" and not torch.cuda.is_available():
        print("the GPU suite needs a CUDA device, and torch sees none: nothing was measured", file=sys.stderr)
        return 1
    if kind == "gpu":
        full_size_folder(FULL_SIZE)
    about = machine("cuda" if kind == "gpu" else "cpu")
    path = RESULTS / f"{slug(about)}-{'full-size-' if kind == 'slow' else ''}{about['date']}.json"
    kept = _done(path, about)
    finished, status = set(kept), 0
    for group in groups.values():
        if group.name in (arguments.groups or set(groups) - finished):
            kept[group.name], passed = _run(group)
            status |= not passed
            finished = finished | {group.name} if passed else finished - {group.name}
            if kind == "slow":
                _add_peaks(kept[group.name])
            records = [record for each in kept.values() for record in each]
            write_result(path, about, {"groups": sorted(finished), "records": records})
    print(path)
    return status


def _run(group: Group) -> tuple[list[dict[str, Any]], bool]:
    """A group's records, and whether all of it passed; in a process of its own, whose models are gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "records"
        kept.touch()
        command = [sys.executable, "-m", "pytest", *group.arguments, "-q", f"--records={kept}"]
        process = subprocess.Popen(command, start_new_session=True)
        try:
            passed = process.wait(group.limit_s) == 0
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and what it had started
            process.wait()
            print(f"group {group.name} was stopped after {group.limit_s} s; the rest of it was not measured")
            passed = False
        records = [json.loads(line) for line in kept.read_text().splitlines()]
    return [{"group": group.name, **record} for record in records], passed


def _done(path: Path, about: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The groups of a result file that this commit finished, with their records."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    if not about["commit"] or found["machine"]["commit"] != about["commit"]:
        return {}
    return {
        name: [record for record in found["records"] if record["group"] == name] for name in found.get("groups", ())
    }


def slug(about: dict[str, Any]) -> str:
    """A machine's name in file names."""
    name = about["device"] if about["device"] != "cpu" else f"{about['cpu']}-{about['cpu_flags']}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _add_peaks(records: list[dict[str, Any]]) -> None:
    """Peak memory of processes of their own, for guided steps and decoding at full size."""
    for record in records:
        case = record["case"].removesuffix("_full_size")
        if case in ("guided_step", "vae_decode") and record["system"] in ("twinstream", "diffusers_eager"):
            command = ["-m", "benchmarks.peak_memory", record["system"], str(FULL_SIZE), record["dtype"], case]
            done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
            record["peak_memory_bytes"] = int(done.stdout.split()[-1])


if __name__ == "__main__":
    sys.exit(main())
