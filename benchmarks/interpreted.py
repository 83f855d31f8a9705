"""What one program of a launch does, counted while Triton's interpreter runs it: ``count_programs(launches)``.

Machine code says what an iteration of a loop takes, but not how many there are, nor what masks leave of a load. The
first program of a launch is run on tensors of its sizes, in a process of its own, where kernels are interpreted.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.launches import Launch

ROOT = Path(__file__).parent.parent


@dataclass(slots=True)
class Counts:
    """Of one program.

    Attributes:
        flops: of its matrix products, whole tiles.
        loaded_bytes, stored_bytes: by all its loads and stores, what masks leave out not counted.
        iterations: of the loop that goes round most often; 0 where there is none.
    """

    flops: float = 0.0
    loaded_bytes: int = 0
    stored_bytes: int = 0
    iterations: int = 0


def shape_key(launch: Launch) -> Hashable:
    """The same for launches that do the same amount of work."""

    def of(x: Any) -> Hashable:
        return (str(x.dtype), tuple(x.shape), x.stride()) if isinstance(x, Tensor) else str(x)

    return launch.kernel, launch.grid, *((name, of(x)) for name, x in (launch.arguments | launch.options).items())


def count_programs(launches: Sequence[Launch]) -> list[Counts]:
    """Of each launch's first program."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "launches"
        path.write_bytes(pickle.dumps(list(launches)))
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "benchmarks.interpreted", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
    return [Counts(**one) for one in json.loads(done.stdout)]


class _EnoughError(Exception):
    """One program has run."""


def _count(launch: Launch, kernel: Any) -> Counts:
    from triton.runtime import interpreter

    counts, builder = Counts(), interpreter.interpreter_builder
    arguments = {name: _on_cpu(x) for name, x in launch.arguments.items()}
    options = {name: x for name, x in launch.options.items() if not name.startswith("num_")}
    with _counting(counts, builder), _counting_loops(counts):
        try:
            kernel[launch.grid](**arguments, **options)
        except Exception as error:  # the interpreter wraps what a kernel raises
            if not isinstance(error, _EnoughError) and not isinstance(error.__cause__, _EnoughError):
                raise
    return counts


def _on_cpu(x: Any) -> Any:
    if isinstance(x, Tensor):
        made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")
        return made.zero_()
    if (base := getattr(x, "base", None)) is not None:  # a tensor descriptor
        return type(x)(_on_cpu(base), x.shape, x.strides, x.block_shape)
    return x


@contextmanager
def _counting(counts: Counts, builder: Any) -> Iterator[None]:
    """Note what the interpreter is asked to do, up to the second program."""
    programs: list[tuple[int, ...]] = []
    dot, load, store, place = (
        getattr(builder, name) for name in ("create_dot", "create_masked_load", "create_masked_store", "set_grid_idx")
    )

    def counted_dot(a: Any, b: Any, *rest: Any) -> Any:
        counts.flops += 2.0 * a.data.size * b.data.shape[-1]
        return dot(a, b, *rest)

    def counted_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        result = load(pointers, mask, *rest)
        counts.loaded_bytes += int(mask.data.sum()) * result.data.itemsize
        return result

    def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        counts.stored_bytes += int(mask.data.sum()) * value.data.itemsize
        return store(pointers, value, mask, *rest)

    def placed(*at: int) -> None:
        if programs:
            raise _EnoughError
        programs.append(at)
        place(*at)

    names = {"create_dot": counted_dot, "create_masked_load": counted_load, "create_masked_store": counted_store}
    with patch.multiple(builder, **names, set_grid_idx=placed):
        yield


@contextmanager
def _counting_loops(counts: Counts) -> Iterator[None]:
    """Note how often ``for ... in range(...)`` of kernels goes round, each where it stands."""
    rounds: Counter[Hashable] = Counter()

    def counted(*bounds: Any) -> Iterator[int]:
        caller = sys._getframe(1)
        place = caller.f_code, caller.f_lineno
        for i in range(*bounds):
            rounds[place] += 1
            yield i

    modules = [module for name, module in sys.modules.items() if name.startswith("engine.kernels.")]
    for module in modules:
        module.__dict__["range"] = counted
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["range"]
        counts.iterations = max(rounds.values(), default=0)


def main() -> None:
    from engine.kernels.jit import load_kernels

    launches: list[Launch] = pickle.loads(Path(sys.argv[1]).read_bytes())
    load_kernels()
    modules = [module for name, module in sys.modules.items() if name.startswith("engine.kernels.")]
    kernels = {name: kernel for module in modules for name, kernel in vars(module).items() if name.endswith("_kernel")}
    print(json.dumps([asdict(_count(launch, kernels[launch.kernel])) for launch in launches]))


if __name__ == "__main__":
    main()
