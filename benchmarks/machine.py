"""What numbers were measured on and with, and where they are kept."""

from __future__ import annotations

import datetime
import json
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
_CODE = (":/", ":!/benchmarks/results", ":!/engine/assets/concepts", ":!/docs")  # what measuring does not write itself


def machine(device: str = "cpu") -> dict[str, Any]:
    """Describe this machine for a result file; ``device`` is where the measured code ran."""
    cpu_info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpu_info.read_text()) if cpu_info.exists() else None
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "cpu": model.group(1) if model else platform.processor(),
        "cpu_flags": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "diffusers", "openvino")},
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        **(_gpu(device) if device.startswith("cuda") else {}),
    }


def commit() -> str:
    """Of the code that runs; told where it was changed since."""
    changed = _git("status", "--porcelain", "-uno", "--", *_CODE)
    return _git("rev-parse", "HEAD") + ("+changes" if changed else "")


def _gpu(device: str) -> dict[str, Any]:
    """What else a GPU's numbers depend on: its architecture, driver and clocks, and the CUDA and Triton in use."""
    major, minor = torch.cuda.get_device_capability(device)
    names = ("driver", "max_clock", "clock", "power_limit")
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.sm,power.limit", "--format=csv,noheader"]
    smi = ["unknown"] * len(names)
    if shutil.which("nvidia-smi"):
        smi = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
    return {
        "compute_capability": 10 * major + minor,
        "cuda": torch.version.cuda,
        "triton": metadata.version("triton"),
        **dict(zip(names, smi, strict=True)),
    }


def write_result(path: Path, about: dict[str, Any], content: dict[str, Any]) -> None:
    """Write a result file: what ``machine`` told, and what was measured."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": about, **content}, indent=1) + "\n")


def _git(*arguments: str) -> str:
    if not shutil.which("git"):
        return ""
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()
