"""Write where a guided step's time goes: ``python -m benchmarks.profile_step [--dtype bfloat16]``.

Every operation of the step, by shapes, ranked by its time, with its floor: the larger of its FLOPs at the machine's
fastest product and its bytes (arguments and result, once) at its fastest copy, both measured here. What is left to gain
is the difference. On a GPU the times are the kernels' own, without the gaps that a graph closes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile, record_function

import engine
from benchmarks.machine import RESULTS, machine
from benchmarks.ops import operation_flops, products
from benchmarks.run import slug
from benchmarks.systems import FULL_SIZE, full_size_folder, planned_step, start_latents
from benchmarks.turns import seconds_of

_ROUNDS, _PREFIX = 3, "step/"
_VIEWS = ("__get__", "permute", "reshape", "unflatten", "flatten", "expand", "split", "chunk", "__len__", "dim", "t")


@dataclass(slots=True)
class Row:
    """All calls of one operation on one set of shapes in a step."""

    name: str
    flops: float
    n_bytes: float
    calls: int = 0
    seconds: float = 0.0


class Watch(TorchFunctionMode):
    """Marks the outermost operations for the profiler, and notes their work."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.depth = 0

    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", str(function))
        if self.depth or name in _VIEWS:
            return function(*args, **(kwargs or {}))
        return self.call(name, function, *args, **(kwargs or {}))

    def call(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run an operation under its name and shapes; what it calls is part of it."""
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim]
        label = f"{name} {' '.join('x'.join(map(str, x.shape)) for x in tensors if x.ndim > 1)}"
        with self._outermost():
            with record_function(_PREFIX + label):
                result = function(*args, **kwargs)
            out = [x for x in (result if isinstance(result, tuple | list) else [result]) if isinstance(x, Tensor)]
            n_bytes = sum(x.numel() * x.element_size() for x in (*tensors, *out))
            self.rows.setdefault(label, Row(label, operation_flops(name, tensors, out), n_bytes)).calls += 1
        return result

    @contextmanager
    def _outermost(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1


def watched(ops: Any, watch: Watch) -> Any:
    """The same ops, each under its own name; no whole blocks, which would hide theirs."""

    def wrap(name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: watch.call(name, getattr(ops, name), *args, **kwargs)

    names = [field.name for field in fields(ops) if field.name not in ("name", "small")]
    return replace(ops, small=None, **{name: wrap(name) for name in names})


def measure(sd: engine.Engine) -> list[Row]:
    """The operations of one guided step, without graphs, the longest first."""
    is_gpu, watch = sd.device.type == "cuda", Watch()
    sd.graphs = None
    for module in sd.unet.modules():
        if hasattr(module, "ops"):
            module.ops = watched(sd.backend, watch)
    step = planned_step(sd, [None], start_latents(sd.unet.config.sample_size, str(sd.device)))
    with torch.no_grad():
        for _ in range(10 if is_gpu else 1):
            step()
        watch.rows.clear()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
        with profile(activities=activities) as found:
            for _ in range(_ROUNDS):
                with watch:
                    step()
    for event in found.key_averages():
        row = watch.rows.get(event.key.removeprefix(_PREFIX)) if event.key.startswith(_PREFIX) else None
        if row is not None and event.device_type == DeviceType.CPU:  # the GPU's own spans have the gaps in them
            row.seconds = (event.device_time_total if is_gpu else event.cpu_time_total) / 1e6 / _ROUNDS
    for row in watch.rows.values():
        row.calls //= _ROUNDS
    return sorted(watch.rows.values(), key=lambda row: -row.seconds)


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of the fastest of a linear layer, a 1x1 and a 3x3 convolution, and byte/s of a copy."""
    n, count = (8192, 1 << 29) if device.type == "cuda" else (3072, 1 << 24)
    x, weight = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(count, dtype=dtype, device=device)
    target = torch.empty_like(source)
    calls = products(x, weight)
    seconds = min(_seconds(call, device) * 2.0 * n**3 / flops for call, flops in calls)
    return 2.0 * n**3 / seconds, 2.0 * source.nbytes / _seconds(lambda: target.copy_(source), device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The median of seven calls."""
    run()
    return sorted(seconds_of(run, device.type) for _ in range(7))[3]


def report(rows: list[Row], most_flops: float, most_bytes: float) -> str:
    """The table, longest first; what is below 0.2 % is summed up."""
    total = sum(row.seconds for row in rows)
    floors = {row.name: row.calls * max(row.flops / most_flops, row.n_bytes / most_bytes) for row in rows}
    lines = [
        f"ceilings: {most_flops / 1e9:,.0f} GFLOP/s, {most_bytes / 1e9:,.0f} GB/s; "
        f"all operations: {total * 1e3:.3f} ms, their floors: {sum(floors.values()) * 1e3:.3f} ms",
        "",
        f"{'operation and shapes':<66}{'calls':>6}{'ms':>11}{'share':>8}{'floor ms':>11}{'to gain':>9}",
    ]
    rest = [row for row in rows if row.seconds < 0.002 * total]
    for row in rows[: len(rows) - len(rest)]:
        gain = (row.seconds - floors[row.name]) / total
        lines.append(
            f"{row.name[:65]:<66}{row.calls:>6}{row.seconds * 1e3:>11.3f}{row.seconds / total:>8.1%}"
            f"{floors[row.name] * 1e3:>11.3f}{gain:>9.1%}"
        )
    seconds = sum(row.seconds for row in rest)
    lines.append(
        f"{f'{len(rest)} others':<66}{sum(row.calls for row in rest):>6}{seconds * 1e3:>11.3f}{seconds / total:>8.1%}"
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="float16 on a GPU and bfloat16 on a CPU unless given")
    arguments = parser.parse_args()
    is_gpu = arguments.device.startswith("cuda")
    dtype = getattr(torch, arguments.dtype or ("float16" if is_gpu else "bfloat16"))
    backend = "triton" if is_gpu else "auto"
    cudnn: Any = torch.backends.cudnn
    cudnn.benchmark = is_gpu  # as graphs are captured
    sd = engine.load(full_size_folder(FULL_SIZE), device=arguments.device, dtype=dtype, backend=backend)
    about = machine(arguments.device)
    text = report(measure(sd), *ceilings(sd.device, dtype))
    name = str(dtype).removeprefix("torch.")
    head = f"A guided step (2 rows, 64x64 latents, {name}, backend {sd.backend.name}) on {slug(about)}, {about['date']}"
    path = RESULTS / f"{slug(about)}-profile-{name}.txt"
    path.write_text(f"{head}, torch {about['versions']['torch']}, commit {about['commit']}\n{text}")
    print(path)


if __name__ == "__main__":
    main()
