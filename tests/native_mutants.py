"""Mutation testing of csrc/: ``python -m tests.native_mutants`` breaks one line at a time and runs its tests.

Everything happens in a copy, for the baseline instruction set alone, with little optimisation; the kernels of all sets
are the same source. A mutant that does not compile does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

_ROOT = Path(__file__).parent.parent
_FLAGS = ("-std=c++20", "-O1", "-g0", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno")
_SWAPS = (  # what stands between spaces is an operator; so are the others only where they look like one
    (r" \+ ", " - "),
    (r" - ", " + "),
    (r" \* ", " + "),
    (r" / ", " * "),
    (r" < ", " <= "),
    (r" \+= ", " = "),
    (r"\bmin\(", "max("),
    (r"\bmax\(", "min("),
    (r"\b0\.5f", "0.25f"),
    (r"\b1\.0f", "2.0f"),
    (r", (\w+), (\w+)\)", r", \2, \1)"),
)
_TESTS = ("tests/backends/test_winograd.py", "tests/backends/test_small_blocks.py", "tests/backends/test_native.py")
_SECONDS = 120.0


class NativeMutant(NamedTuple):
    file: str
    line: int
    original: str
    mutated: str


def candidates() -> list[NativeMutant]:
    """Every change of one place in a line of code."""
    found = []
    for path in sorted((_ROOT / "csrc").iterdir()):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.lstrip().startswith(("//", "#", "template", "using", "EXPORT", "static_assert")):
                continue
            code, comment, rest = line.partition("//")
            for pattern, swap in _SWAPS:
                for match in re.finditer(pattern, code):
                    changed = code[: match.start()] + match.expand(swap) + code[match.end() :]
                    if changed != code:
                        found.append(NativeMutant(path.name, number, line, changed + comment + rest))
    return found


def judge(tree: Path, mutant: NativeMutant | None) -> str:
    """What becomes of a mutant, or of the source as it is: "killed", "timed_out", "survived"; "invalid" if not C++."""
    source = tree / "csrc" / (mutant.file if mutant else "kernels.cpp")
    text = source.read_text()
    if mutant is not None:
        lines = text.splitlines()
        lines[mutant.line - 1] = mutant.mutated
        source.write_text("\n".join(lines) + "\n")
    library, kernels = tree / "engine/backends/_native_baseline.so", tree / "csrc/kernels.cpp"
    tests = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *_TESTS]
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTEST_XDIST_WORKER": "gw0"}
    try:
        built = ["g++", *_FLAGS, "-shared", "-fPIC", "-o", str(library), str(kernels)]
        if subprocess.run(built, capture_output=True, check=False).returncode:
            return "invalid"
        options = {"cwd": tree, "env": environment, "capture_output": True, "timeout": _SECONDS}
        return "killed" if subprocess.run(tests, check=False, **options).returncode else "survived"
    except subprocess.TimeoutExpired:
        return "timed_out"
    finally:
        source.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.native_mutants", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10.0, help="after which no further mutant is tried")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results" / "mutants-csrc.json")
    options = parser.parse_args()
    everything = candidates()
    chosen = random.Random(options.seed).sample(everything, min(options.count, len(everything)))
    head = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(head, cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()
    tried: list[tuple[NativeMutant, str]] = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder) / "tree"
        ignored = shutil.ignore_patterns(".*", "__pycache__", "out", "site", "build", "*.so", "*.egg-info")
        shutil.copytree(_ROOT, tree, symlinks=True, ignore=ignored)
        if judge(tree, None) != "survived":
            raise SystemExit("the tests of csrc/ must pass on the source as it is")
        until = time.monotonic() + 60 * options.minutes
        for mutant in chosen:
            if time.monotonic() > until:
                break
            tried.append((mutant, judge(tree, mutant)))
            print(tried[-1][1], f"csrc/{mutant.file}:{mutant.line}", mutant.mutated.strip(), sep="  ", flush=True)
    valid = [(mutant, outcome) for mutant, outcome in tried if outcome != "invalid"]
    survivors = [mutant._asdict() for mutant, outcome in valid if outcome == "survived"]
    score = round(1 - len(survivors) / len(valid), 3) if valid else None
    result = {
        "commit": commit,
        "seed": options.seed,
        "candidates": len(everything),
        "tried": len(valid),
        "score": score,
    }
    options.out.write_text(json.dumps(result | {"survivors": survivors}, indent=1, ensure_ascii=False) + "\n")
    print(result, "->", options.out)


if __name__ == "__main__":
    main()
