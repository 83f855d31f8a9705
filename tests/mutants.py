"""Mutation testing: break the source in small ways, one at a time, and see whether a test notices.

``python -m tests.mutants`` never touches the working tree: everything happens in a copy. Which test files may notice
is traced once, function by function, and kept in ``out/``; each mutant is then judged by a process forked from one
that has torch and diffusers loaded.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.mutators import Mutant, find_mutants, is_change

_ROOT = Path(__file__).parent.parent
_WEIGHTS = {"engine/sampling": 4, "engine/methods": 4, "engine/train": 4, "engine/models": 2, "engine/text": 2}
_DIFFUSERS = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"
_PRELOADED = ("torch._dynamo", "pytest", _DIFFUSERS, "transformers.models.clip.modeling_clip")
_LEFT_OUT = (".*", "__pycache__", "out", "runs", "build", "*.egg-info")
_SLOW = {"tests/kernels": "kernels/", "tests/backends": "engine/backends/"}  # asked of their own folders' mutants alone
_OUTCOMES = ("killed", "timed_out", "survived", "explained")


@dataclass(frozen=True, slots=True)
class Coverage:
    """What a test file does: its duration, the tests that fail as things are, and the functions that it calls."""

    seconds: float
    failed: list[str]
    calls: set[tuple[str, int]]


class Copy:
    """A copy of the tree, in which mutants are judged."""

    def __init__(self, root: Path, folder: Path, preload: Sequence[str] = ()) -> None:
        self.folder, self.scratch = folder / "tree", folder / "scratch"
        shutil.copytree(root, self.folder, symlinks=True, ignore=shutil.ignore_patterns(*_LEFT_OUT))
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(list(preload))
        warm = self.context.Process(target=int)  # the first one waits for what is loaded beforehand
        warm.start()
        warm.join()

    def test(self, files: Sequence[str], timeout: float, options: Sequence[str] = (), trace=False) -> int | None:
        """pytest's exit status, None if it took too long; with a trace, writes it to ``scratch/trace.json``."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        arguments = (str(self.folder), str(self.scratch), [*files, *options], trace, [str(_ROOT), str(Path.cwd())])
        process = self.context.Process(target=_pytest, args=arguments)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            return None
        return process.exitcode

    @contextmanager
    def mutated(self, mutant: Mutant) -> Iterator[None]:
        path = self.folder / mutant.path
        original = path.read_text()
        path.write_text(mutant.apply(original))
        try:
            yield
        finally:
            path.write_text(original)


def _pytest(tree: str, scratch: str, arguments: list[str], trace: bool, hidden: list[str]) -> None:
    """In a process of its own: run pytest in a tree as if nothing had been imported from elsewhere."""
    os.setpgrp()
    log = os.open(f"{scratch}/log.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(tree)
    here = {path.name.removesuffix(".py") for path in Path(tree).iterdir()}
    for name in [name for name in sys.modules if name.split(".")[0] in here]:
        del sys.modules[name]
    sys.path[:] = [tree, *(path for path in sys.path if path and path not in hidden)]
    sys.dont_write_bytecode = True
    os.environ.update(PYTHONPATH=tree, PYTHONDONTWRITEBYTECODE="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    os.environ["PYTEST_XDIST_WORKER"] = "gw0"  # one thread, so that none waits for another on a busy machine
    import pytest

    options = ["-q", "-p", "no:cacheprovider", f"--rootdir={tree}", f"--basetemp={scratch}/tmp"]
    tracer = _Tracer(tree)
    if trace:
        threading.settrace(tracer.call)
        sys.settrace(tracer.call)
    start = time.monotonic()
    status = int(pytest.main([*options, *arguments], plugins=[tracer]))
    sys.settrace(None)
    traced = {"seconds": time.monotonic() - start, "failed": tracer.failed, "calls": sorted(tracer.calls())}
    Path(scratch, "trace.json").write_text(json.dumps(traced))
    os._exit(status)


class _Tracer:
    """Notes which functions are called, and which tests fail."""

    def __init__(self, tree: str) -> None:
        self.tree, self.codes, self.failed = f"{tree}/", set[Any](), list[str]()

    def call(self, frame: Any, *_: Any) -> None:
        self.codes.add(frame.f_code)

    def calls(self) -> set[tuple[str, int]]:
        own = [code for code in self.codes if code.co_filename.startswith(self.tree)]
        lines = [0 if code.co_name == "<module>" else code.co_firstlineno for code in own]
        paths = [str(Path(code.co_filename).resolve().relative_to(Path(self.tree).resolve())) for code in own]
        return set(zip(paths, lines, strict=True))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


def cover(copy: Copy, files: Sequence[str], timeout: float, say: Callable[[str], None]) -> dict[str, Coverage]:
    """What each test file calls. One that takes too long is left out, and said so."""
    covered = {}
    for file in files:
        status = copy.test([file], timeout, trace=True)
        if status not in (0, 1, 5):  # passed, failed, nothing to run
            say(f"left out, {f'takes longer than {timeout:g} s' if status is None else 'cannot be run'}: {file}")
            continue
        traced = json.loads((copy.scratch / "trace.json").read_text())
        covered[file] = Coverage(traced["seconds"], traced["failed"], {(path, at) for path, at in traced["calls"]})
        failing = f", of which {len(traced['failed'])} tests fail as it is" if traced["failed"] else ""
        say(f"{traced['seconds']:6.1f} s {file}{failing}")
    return covered


def choose_tests(mutant: Mutant, covered: dict[str, Coverage]) -> list[str]:
    """Test files that may notice, the likeliest and quickest first: the mirror, its folder, the others."""
    room = Path(mutant.path).parent.relative_to("engine") if mutant.path.startswith("engine/") else Path("kernels")
    mirror, folders = Path("tests", room, f"test_{Path(mutant.path).name}"), {Path("tests"), Path("tests/parity")}

    def order(file: str) -> tuple[bool, bool, float]:
        return Path(file) != mirror, Path(file).parent != mirror.parent, covered[file].seconds

    def may_notice(file: str) -> bool:
        if Path(file) == mirror:
            return True
        near = mutant.function or Path(file).parent in {mirror.parent, *folders}  # nearly all import a module
        return bool(near) and (mutant.path, mutant.function) in covered[file].calls

    return sorted(filter(may_notice, covered), key=order)


def judge(copy: Copy, mutant: Mutant, covered: dict[str, Coverage]) -> str:
    """Whether the tests notice: "killed", "timed_out" or "survived"."""
    files = choose_tests(mutant, covered)
    if not files:
        return "survived"
    known = [f"--deselect={test}" for file in files for test in covered[file].failed]
    with copy.mutated(mutant):
        status = copy.test(files, 30 + 3 * sum(covered[file].seconds for file in files), ["-x", *known])
    return "timed_out" if status is None else "survived" if status in (0, 5) else "killed"


def candidates(root: Path, pattern: str = "*") -> dict[str, list[Mutant]]:
    """All mutants by file. Of kernels, those of references and launchers alone: what a GPU runs has no test here."""
    found = {}
    for path in sorted([*root.glob("engine/**/*.py"), *root.glob("kernels/*.py")]):
        name = path.relative_to(root).as_posix()
        if fnmatch.fnmatch(name, pattern) and path.resolve() == root.resolve() / name:
            found[name] = find_mutants(name, path.read_text(), functions_only=name.startswith("kernels/"))
    return found


def sample(root: Path, found: dict[str, list[Mutant]], count: int, seed: int) -> list[Mutant]:
    """``count`` mutants in a random order; each file has its share by its mutants and its folder's weight."""
    weights = {name: len(mutants) * _WEIGHTS.get(_folder(name), 1) for name, mutants in found.items()}
    chosen, total, spent = list[Mutant](), max(1, sum(weights.values())), 0
    for name, mutants in found.items():
        before, spent = spent, spent + weights[name]
        share = round(count * spent / total) - round(count * before / total)
        source = (root / name).read_text()
        shuffled = iter(random.Random(f"{seed}:{name}").sample(mutants, len(mutants)))
        while share and (mutant := next(shuffled, None)) is not None:
            if is_change(mutant, source):
                chosen.append(mutant)
                share -= 1
    random.Random(seed).shuffle(chosen)
    return chosen


def _folder(path: str) -> str:
    return Path(path).parent.as_posix()


def report(root: Path, tried: Sequence[tuple[Mutant, str]], explained: Sequence[dict[str, str]], seed: int) -> dict:
    """What is written: counts and scores by folder, and every survivor as file, line, and the line before and after."""
    reasons = {(one["file"], one["original"], one["mutated"]): one["reason"] for one in explained}
    counts, survivors = dict[str, Counter[str]](), list[dict[str, Any]]()
    for mutant, outcome in tried:
        line, original, mutated = mutant.lines((root / mutant.path).read_text())
        is_explained = outcome == "survived" and (mutant.path, original, mutated) in reasons
        counts.setdefault(_folder(mutant.path), Counter())["explained" if is_explained else outcome] += 1
        if outcome == "survived" and not is_explained:
            survivor = {"file": mutant.path, "line": line, "operator": mutant.operator}
            survivors.append({**survivor, "original": original, "mutated": mutated})
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False).stdout
    folders = {folder: _score(counts[folder]) for folder in sorted(counts)}
    head = {"commit": commit.strip(), "seed": seed, "all": _score(sum(counts.values(), Counter()))}
    return {**head, "folders": folders, "survivors": sorted(survivors, key=lambda one: (one["file"], one["line"]))}


def _score(outcomes: Counter[str]) -> dict[str, Any]:
    noticed, wanted = outcomes["killed"] + outcomes["timed_out"], outcomes.total() - outcomes["explained"]
    counts = {"tried": outcomes.total(), **{name: outcomes[name] for name in _OUTCOMES}}
    return {**counts, "score": round(noticed / wanted, 3) if wanted else None}


def _test_files(mutated: set[str]) -> list[str]:
    tests = [path.relative_to(_ROOT).as_posix() for path in sorted((_ROOT / "tests").rglob("test_*.py"))]
    spared = {folder for folder, sources in _SLOW.items() if not any(path.startswith(sources) for path in mutated)}
    return [t for t in tests if t != "tests/test_mutants.py" and _folder(t) not in {"tests/benchmarks", *spared}]


def _cached_coverage(copy: Copy, files: list[str], timeout: float) -> dict[str, Coverage]:
    sources = sorted(path for path in copy.folder.rglob("*.py") if not path.name.startswith("mut"))
    texts = [path.read_bytes() for path in sources]
    key = hashlib.sha256(b"".join([*texts, json.dumps([files, timeout]).encode()])).hexdigest()[:16]
    path = _ROOT / "out" / f"mutants-{key}.json"
    if not path.exists():
        covered = cover(copy, files, timeout, lambda text: print(text, flush=True))
        path.parent.mkdir(exist_ok=True)
        plain = {file: [one.seconds, one.failed, sorted(one.calls)] for file, one in covered.items()}
        path.write_text(json.dumps(plain))
    loaded = json.loads(path.read_text())
    return {file: Coverage(*one, {(p, at) for p, at in calls}) for file, (*one, calls) in loaded.items()}


def _told(mutant: Mutant) -> str:
    line, original, mutated = mutant.lines((_ROOT / mutant.path).read_text())
    return f"{mutant.path}:{line} [{mutant.operator}]\n  - {original}\n  + {mutated}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--count", type=int, default=100, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", default="*", metavar="GLOB", help="of sources, such as 'engine/train/*'")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no further mutant is tried")
    parser.add_argument("--file-seconds", type=float, default=60.0, help="test files that take longer are left out")
    parser.add_argument("--list", action="store_true", help="show the mutants and try none")
    parser.add_argument("--explained", type=Path, default=_ROOT / "tests" / "mutants_explained.json")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results" / "mutants.json")
    options = parser.parse_args()
    mutants = sample(_ROOT, candidates(_ROOT, options.files), options.count, options.seed)
    if options.list:
        for mutant in mutants:
            print(_told(mutant))
        return
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # as the tests' own conftest does
    files = _test_files({mutant.path for mutant in mutants})
    explained = json.loads(options.explained.read_text()) if options.explained.exists() else []
    tried = list[tuple[Mutant, str]]()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Copy(_ROOT, Path(folder), _PRELOADED)
        covered = _cached_coverage(copy, files, options.file_seconds)
        until = time.monotonic() + 60 * options.minutes
        for mutant in mutants:
            if time.monotonic() > until:
                break
            tried.append((mutant, judge(copy, mutant, covered)))
            print(f"{len(tried)}/{len(mutants)} {tried[-1][1]}: {_told(mutant)}", flush=True)
    result = report(_ROOT, tried, explained, options.seed)
    options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(result["all"]), "->", options.out)


if __name__ == "__main__":
    main()
