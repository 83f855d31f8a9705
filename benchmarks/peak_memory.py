"""Print the peak resident memory, in bytes, of a process that loads one system and runs one case twice.

``python -m benchmarks.peak_memory {twinstream,diffusers_eager} FOLDER DTYPE CASE``; ``benchmarks.run --slow`` calls it.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from benchmarks.peers import diffusers_eager
from benchmarks.systems import twinstream


def main() -> None:
    system, folder, dtype, case = sys.argv[1:]
    make = {"twinstream": twinstream, "diffusers_eager": diffusers_eager}[system]
    run = make(Path(folder), getattr(torch, dtype)).cases[case]
    with torch.no_grad():
        for _ in range(2):
            run()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    main()
