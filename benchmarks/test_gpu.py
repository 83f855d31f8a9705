"""The GPU suite: ceilings, kernels, steps, pictures, and what comes before the first one, beside the peers.

Errors are against diffusers in float32 without TF32, in the same run. A test's name begins with its group, by which
``python -m benchmarks.run --gpu`` resumes. Without a GPU everything is skipped; ``--try-out`` runs it on the CPU once.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import Keep
from benchmarks.ops import KERNELS, ROWS, call, cases, random, relative_error
from benchmarks.peers import diffusers_compile, diffusers_eager, diffusers_xformers
from benchmarks.systems import (
    CONCEPT_SETS,
    FULL_SIZE,
    IMAGES,
    System,
    case_of,
    full_size_folder,
    twinstream,
    twinstream_auto,
)
from benchmarks.turns import milliseconds, take_turns
from engine.backends.ops import TORCH
from engine.kernels.layer_norm_geglu import layer_norm_geglu_unfused
from engine.weights.checkpoint import EMBEDDED_MODEL

_METHOD_ROWS = {
    "infusion_parallel_1": 4,
    "infusion_shared": 3,
    f"infusion_parallel_{CONCEPT_SETS}": 2 + 2 * CONCEPT_SETS,
    "dci_mixing_step": 3,
}
_DCI_FRACTION = 0.2  # of the steps, over which dci_average is taken
_CALLS = 20  # of a kernel, in one graph
_OPS = {name: op for name, op in cases() if op.name != "conv3x3"}  # which is torch's own there


@dataclass(frozen=True)
class Suite:
    """Where the suite runs."""

    device: str

    @property
    def folder(self) -> Path:
        return EMBEDDED_MODEL if self.device == "cpu" else _full_size()

    @property
    def half(self) -> torch.dtype:
        """What most cases are timed in."""
        return torch.bfloat16 if self.device == "cpu" else torch.float16

    def ours(self, dtype: torch.dtype) -> list[Callable[..., System]]:
        """Backend "triton", and where the card is calibrated "auto" beside it."""
        return [twinstream, *([twinstream_auto] if dtype == self.half else [])]

    @property
    def rounds(self) -> tuple[int, int]:
        """How many are measured, and how many come before."""
        return (1, 0) if self.device == "cpu" else (50, 10)

    def turns(
        self, benchmark: Any, ours: Callable[[], Any], peers: Mapping[str, Callable[[], Any]]
    ) -> dict[str, list[float]]:
        rounds, warmup_rounds = self.rounds
        return take_turns(benchmark, ours, peers, rounds, self.device, warmup_rounds)


@cache
def _full_size() -> Path:
    return full_size_folder(FULL_SIZE)


@pytest.fixture(scope="module")
def suite(request: pytest.FixtureRequest) -> Iterator[Suite]:
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False  # float32 is the truth here
    yield Suite("cpu" if request.config.getoption("try_out") else "cuda")
    matmul.allow_tf32, cudnn.allow_tf32 = before


@pytest.fixture(params=["float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest, suite: Suite) -> torch.dtype:
    if suite.device == "cpu" and request.param == "float16":
        pytest.skip("float16 is 1000 times slower than bfloat16 on a CPU")
    return getattr(torch, request.param)


@cache
def _system(make: Callable[..., System], folder: Path, dtype: torch.dtype, device: str) -> System:
    return make(folder, dtype, device)


@cache
def _exact(folder: Path, case: str, device: str) -> Tensor:
    with torch.no_grad():
        return _system(diffusers_eager, folder, torch.float32, device).cases[case]().cpu()


def _first_run(run: Callable[[], Tensor], system: System, device: str) -> tuple[Tensor, int | None]:
    """A case's result, and the peak memory of a process that had nothing but its system's weights."""
    if device == "cpu":
        return run(), None
    system.forget()  # a replayed graph allocates nothing
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    return result, system.parameter_bytes + torch.cuda.max_memory_allocated() - before


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _compare(
    benchmark: Any, keep: Keep, suite: Suite, dtype: torch.dtype, case: str, rows: int, systems: list[System]
) -> None:
    """One case of several systems, ours first."""
    runs = {system.name: system.cases[case] for system in systems if case in system.cases}
    with torch.no_grad():
        first = {s.name: _first_run(runs[s.name], s, suite.device) for s in systems if s.name in runs}
        exact = _exact(suite.folder, case, suite.device)
        errors = {name: relative_error(result.cpu(), exact) for name, (result, _) in first.items()}
        peers = {name: run for name, run in runs.items() if name != "twinstream"}
        seconds = suite.turns(benchmark, runs["twinstream"], peers)
    n = CONCEPT_SETS if case.endswith(f"_{CONCEPT_SETS}") and case.startswith("infusion") else 1
    label = f"{case}_per_concept" if n > 1 else case
    label = "guided_step" if label.startswith("guided_step") else label
    prefix = {"case": label, "dtype": _name(dtype), "rows": rows}
    keep(
        [
            {
                **prefix,
                "system": name,
                **milliseconds([one / n for one in each]),
                "rel_error": errors[name],
                "peak_memory_bytes": first[name][1],
            }
            for name, each in seconds.items()
        ]
    )
    _check(errors)


def _check(errors: Mapping[str, float]) -> None:
    """At most twice what eager code errs at the same dtype; a float32 rounding is always allowed."""
    eager = errors.get("diffusers_eager", errors.get("torch_eager"))
    assert eager is not None
    assert all(errors[name] <= 2 * eager + 1e-5 for name in errors if name.startswith("twinstream")), errors


@torch.no_grad()
def test_kernels_ceilings(benchmark: Any, keep: Keep, suite: Suite, dtype: torch.dtype) -> None:
    n, count = (8192, 1 << 29) if suite.device == "cuda" else (256, 1 << 16)
    x, weight = (random(n, n).to(suite.device, dtype) for _ in range(2))
    source = torch.zeros(count, dtype=dtype, device=suite.device)
    target = torch.empty_like(source)
    seconds = suite.turns(benchmark, lambda: target.copy_(source), {"product": lambda: x @ weight})
    prefix = {"dtype": _name(dtype), "rows": 1, "system": "ceiling", "rel_error": 0.0}
    product, copy = (milliseconds(seconds[name]) for name in ("product", "twinstream"))
    keep([{**prefix, "case": "product", **product, "flops": 2.0 * n**3}])
    keep([{**prefix, "case": "copy", **copy, "bytes": 2.0 * source.nbytes}])


@pytest.mark.parametrize("case", _OPS)
@torch.no_grad()
def test_kernels_of_ops(benchmark: Any, keep: Keep, suite: Suite, case: str) -> None:
    op, dtype = _OPS[case], torch.float16 if suite.device == "cuda" else torch.float32
    kernels = KERNELS if suite.device == "cuda" else TORCH
    arguments = [x.to(suite.device) if isinstance(x, Tensor) else x for x in op.arguments(dtype)]
    in_double = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
    exact = call(TORCH, op, in_double)()
    calls = {name: call(ops, op, arguments) for name, ops in (("twinstream", kernels), ("torch_eager", TORCH))}
    if op.name == "layer_norm_geglu":
        given: list[Any] = arguments
        calls["unfused"] = lambda: layer_norm_geglu_unfused(*given)
    errors = {name: relative_error(run(), exact) for name, run in calls.items()}
    loops = {name: _repeated(run, suite.device) for name, run in calls.items()}
    seconds = suite.turns(benchmark, loops.pop("twinstream"), loops)
    prefix = {"case": case, "op": op.name, "sizes": op.sizes, "dtype": _name(dtype), "rows": ROWS, **op.work(dtype)}
    times = {name: milliseconds([one / _CALLS for one in each]) for name, each in seconds.items()}
    keep([{**prefix, "system": name, **times[name], "rel_error": errors[name]} for name in calls])
    _check(errors)


def _repeated(run: Callable[[], Tensor], device: str) -> Callable[[], object]:
    """Many calls in one graph: single ones are shorter than their launches."""
    if device == "cpu":
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            run()
    return graph.replay


@pytest.mark.parametrize(
    ("dtype", "n_images"), [*(("float16", n) for n in IMAGES), ("bfloat16", 1)], indirect=["dtype"]
)
def test_steps_guided(benchmark: Any, keep: Keep, suite: Suite, dtype: torch.dtype, n_images: int) -> None:
    systems = [_system(make, suite.folder, dtype, suite.device) for make in (*suite.ours(dtype), diffusers_eager)]
    _compare(benchmark, keep, suite, dtype, case_of(n_images), 2 * n_images, systems)


def test_steps_with_xformers(benchmark: Any, keep: Keep, suite: Suite) -> None:
    pytest.importorskip("xformers.ops")
    makers = (twinstream, diffusers_eager, diffusers_xformers)
    systems = [_system(make, suite.folder, torch.float16, suite.device) for make in makers]
    _compare(benchmark, keep, suite, torch.float16, "guided_step", 2, systems)


@pytest.mark.parametrize("case", _METHOD_ROWS)
def test_steps_of_methods(benchmark: Any, keep: Keep, suite: Suite, case: str) -> None:
    dtype = suite.half
    systems = [_system(make, suite.folder, dtype, suite.device) for make in (*suite.ours(dtype), diffusers_eager)]
    _compare(benchmark, keep, suite, dtype, case, _METHOD_ROWS[case], systems)


def test_steps_of_dci_on_average(benchmark: Any, keep: Keep, suite: Suite) -> None:
    """Mixing steps for a fraction of the run, guided steps for the rest."""
    dtype = suite.half
    systems = [_system(make, suite.folder, dtype, suite.device) for make in (twinstream, diffusers_eager)]
    with torch.no_grad():
        exact = _exact(suite.folder, "dci_mixing_step", suite.device)
        errors = {s.name: relative_error(s.cases["dci_mixing_step"]().cpu(), exact) for s in systems}
        n_mixing, n_steps = round(_DCI_FRACTION * 10), 10

        def run(system: System) -> Callable[[], object]:
            mix, plain = system.cases["dci_mixing_step"], system.cases["guided_step"]
            return lambda: [step() for step in [mix] * n_mixing + [plain] * (n_steps - n_mixing)]

        rounds = max(1, suite.rounds[0] // 5)
        seconds = take_turns(benchmark, run(systems[0]), {systems[1].name: run(systems[1])}, rounds, suite.device)
    prefix = {"case": "dci_average", "dtype": _name(dtype), "rows": 3, "fraction": _DCI_FRACTION}
    times = {name: milliseconds([one / n_steps for one in each]) for name, each in seconds.items()}
    keep([{**prefix, "system": name, **times[name], "rel_error": errors[name]} for name in times])
    _check(errors)


def test_pictures_decoded(benchmark: Any, keep: Keep, suite: Suite) -> None:
    dtype = suite.half
    systems = [_system(make, suite.folder, dtype, suite.device) for make in (*suite.ours(dtype), diffusers_eager)]
    _compare(benchmark, keep, suite, dtype, "vae_decode", 1, systems)


@pytest.mark.parametrize(
    ("steps", "n_images", "size"), [(50, 1, 512), (20, 1, 512), (30, 1, 512), (50, 4, 512), (50, 8, 512), (50, 1, 768)]
)
@torch.no_grad()
def test_pictures_generated(benchmark: Any, keep: Keep, suite: Suite, steps: int, n_images: int, size: int) -> None:
    """From the prompt to pixels on the host, in wall time."""
    dtype, pixels = (torch.float16, size) if suite.device == "cuda" else (torch.float32, None)
    steps = steps if suite.device == "cuda" else 2
    ours, theirs = (_system(make, suite.folder, dtype, suite.device) for make in (twinstream, diffusers_eager))
    runs = {system.name: lambda s=system: s.generate(steps, n_images, pixels) for system in (ours, theirs)}
    exact = _exact_picture(suite, steps, pixels)
    first = {s.name: _first_run(runs[s.name], s, suite.device) for s in (ours, theirs)}
    errors = {name: relative_error(result[0], exact) for name, (result, _) in first.items()}
    rounds = 5 if suite.device == "cuda" and n_images == 1 else 2
    seconds = take_turns(benchmark, runs["twinstream"], {"diffusers_eager": runs["diffusers_eager"]}, rounds)
    case = f"generate_{steps}" + (f"_at_{size}" if size != 512 else "")
    prefix = {"case": case, "dtype": _name(dtype), "rows": 2 * n_images}
    keep(
        [
            {**prefix, "system": n, **milliseconds(each), "rel_error": errors[n], "peak_memory_bytes": first[n][1]}
            for n, each in seconds.items()
        ]
    )
    _check(errors)


@cache
def _exact_picture(suite: Suite, steps: int, size: int | None) -> Tensor:
    return _system(diffusers_eager, suite.folder, torch.float32, suite.device).generate(steps, 1, size)[0]


@torch.no_grad()
def test_pictures_of_another_concept(benchmark: Any, keep: Keep, suite: Suite) -> None:
    """A step with a concept that was not there before: it is projected, planned and written into the buffers."""
    dtype = torch.float16 if suite.device == "cuda" else torch.float32
    ours = _system(twinstream, suite.folder, dtype, suite.device)
    switching, staying = ours.cases["concept_switch"], ours.cases["infusion_parallel_1"]
    exact = _exact(suite.folder, "infusion_parallel_1", suite.device)
    error = relative_error(switching().cpu(), exact)  # the first concept is that case's own
    seconds = suite.turns(benchmark, switching, {"staying": staying})
    record = {"case": "concept_switch", "dtype": _name(dtype), "rows": 4, "system": "twinstream", "rel_error": error}
    keep([{**record, **milliseconds(seconds["twinstream"])}])


_START = {
    "twinstream": "import engine\n"
    "sd = engine.load({folder!r}, device={device!r}, dtype={dtype!r}, backend={backend!r})\n"
    "sd.generate('a cat', steps=20, progress=False).images[0]",
    "diffusers_eager": "import torch, diffusers\n"
    "p = diffusers.StableDiffusionPipeline.from_pretrained({folder!r}, torch_dtype=getattr(torch, {dtype!r}))\n"
    "p.to({device!r})('a cat', num_inference_steps=20).images[0]",
}


def test_start(keep: Keep, suite: Suite) -> None:
    """From the start of a process to its first picture of 20 steps."""
    dtype, backend = ("float16", "triton") if suite.device == "cuda" else ("float32", "auto")
    fill = {"folder": str(suite.folder), "device": suite.device, "dtype": dtype, "backend": backend}
    for name, code in _START.items():
        seconds = []
        for _ in range(2 if suite.device == "cuda" else 1):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code.format(**fill)], check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
        record = {"case": "cold_start", "dtype": dtype, "rows": 2, "system": name, "rel_error": None}
        keep([{**record, **milliseconds(seconds)}])


def test_compiled(benchmark: Any, keep: Keep, suite: Suite) -> None:
    """Beside torch.compile with max-autotune, which alone takes minutes; compiling is not in the times."""
    dtype = torch.float16 if suite.device == "cuda" else torch.float32
    makers = (twinstream, diffusers_eager, diffusers_compile)
    systems = [_system(make, suite.folder, dtype, suite.device) for make in makers]
    _compare(benchmark, keep, suite, dtype, "guided_step", 2, systems)
