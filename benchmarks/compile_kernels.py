"""Compile every Triton kernel ahead of time, on any machine: ``python -m benchmarks.compile_kernels``.

Builds real cubins for each architecture in the configurations that the engine launches: those that SD v1.5's steps
and its decoder launch (``benchmarks/launches.py``), each once for all launches that Triton compiles alike. It compiles
by dtypes, constants, and which numbers are 1 or divide by 16. Prints registers as the cubin states them, shared memory
as Triton asks for it, spills as the instructions in it that touch local memory, and matrix products as its tensor-core
instructions, those of whole warp groups (HGMMA, of Hopper) apart from those of single warps (HMMA).
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Hashable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from benchmarks.launches import (
    EMBEDDED,
    SD_V1_5,
    SD_V1_5_VAE,
    Launch,
    Recorder,
    decode_launches,
    step_launches,
)
from engine.kernels.attention import attention_triton
from engine.kernels.cross_attention_pair import cross_attention_pair_triton
from engine.kernels.geglu import geglu_triton
from engine.kernels.group_norm_silu import group_norm_silu_triton
from engine.kernels.jit import load_kernels
from engine.kernels.linear_add import linear_add_triton

ARCHITECTURES = (80, 86, 89, 90)
MAX_SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}  # of a block, by NVIDIA's documentation
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_HEADS, _GROUPS, _TEXT, _LONG_TEXT = 8, 32, 77, 154
_STAGES = ((4096, 320), (1024, 640), (256, 1280))


@dataclass(frozen=True, slots=True)
class Usage:
    """What one kernel takes on one architecture."""

    kernel: str
    dtype: str
    numbers: str
    constants: str
    architecture: int
    registers: int
    shared_bytes: int
    spill_instructions: int
    warp_group_products: int
    warp_products: int


@dataclass(frozen=True)
class Configuration:
    """A kernel as Triton compiles it once: the first launch that asks for it."""

    dtype: str
    launch: Launch

    @property
    def numbers(self) -> str:
        """What is told apart of its numbers, in words."""
        numbers = {name: x for name, x in self.launch.arguments.items() if isinstance(x, int)}
        return " ".join(f"{name}={_specialised(x)}" for name, x in numbers.items())

    @property
    def constants(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.launch.options.items())


def _specialised(x: Any) -> Hashable:
    """What Triton compiles an argument on."""
    if isinstance(x, Tensor):
        return str(x.dtype)
    if isinstance(x, int):
        return "1" if x == 1 else "16n" if x % 16 == 0 else "n"
    described = getattr(x, "base", None)  # a tensor descriptor
    return type(x).__name__ if described is None else (_specialised(described), tuple(x.block_shape))


def key_of(launch: Launch) -> Hashable:
    """The same for launches that Triton compiles alike."""
    arguments = tuple((name, _specialised(x)) for name, x in launch.arguments.items())
    return launch.kernel, arguments, tuple(launch.options.items())


def configurations(every: bool = False, architecture: int = 90) -> list[Configuration]:
    """What the engine launches on a card for SD v1.5 at 512x512; also elsewhere, if ``every``.

    That is for several pictures, at a size whose halves are no multiples of 16, with long texts, and in the embedded
    model.
    """
    found: dict[Hashable, Configuration] = {}
    for name, dtype in DTYPES.items():
        for launch in _launches(dtype, every, architecture):
            if launch.is_ours:
                found.setdefault(key_of(launch), Configuration(name, launch))
    return list(found.values())


def _launches(dtype: torch.dtype, every: bool, architecture: int) -> Iterator[Launch]:
    step = functools.partial(step_launches, dtype=dtype, architecture=architecture)
    for case in ("plain", "infusion", "dci"):
        yield from step(SD_V1_5, case=case)
    yield from decode_launches(SD_V1_5_VAE, dtype, (64, 64), architecture)
    yield from _not_in_a_step(dtype, architecture)
    if not every:
        return
    for n in (2, 4):
        yield from step(SD_V1_5, n=n)
    for case in ("plain", "infusion", "dci"):
        yield from step(SD_V1_5, case=case, size=(72, 56))
        yield from step(SD_V1_5, case=case, text_length=_LONG_TEXT)
        yield from step(EMBEDDED, case=case)


@torch.no_grad()
def _not_in_a_step(dtype: torch.dtype, architecture: int) -> list[Launch]:
    """Kernels beside those of a step: what calibration times against them, and what the fused ones are held against."""
    recorder = Recorder(architecture)
    with recorder.recording(), torch.device("meta"):
        for N, C in _STAGES:
            rows, side = torch.empty(2 * N, C, dtype=dtype), int(N**0.5)
            linear_add_triton(rows, rows[:C], rows[0], rows, tma=False)
            attention_triton(rows.view(2, N, C), rows.view(2, N, C), rows.view(2, N, C), _HEADS, is_split=True)
            picture = torch.empty(2, C, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
            for launches in (1, 2) if N in range(1024, 4097) else ():
                group_norm_silu_triton(picture, None, rows[0], rows[0], _GROUPS, 1e-5, launches)
            q, k, v = (torch.empty(2, n, C, dtype=dtype, device="meta") for n in (N, _TEXT, _TEXT))
            tokens, residuals = torch.empty(2, 1, dtype=torch.int64, device="meta"), v[:, :1].contiguous()
            cross_attention_pair_triton(q, k, v, tokens, residuals, _HEADS)
            geglu_triton(torch.empty(2, N, 8 * C, dtype=dtype, device="meta"))
    return recorder.launches


class _Driver:
    """In the place of Triton's driver: names the target, and nothing is ever loaded."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # by which Triton keeps what it has compiled

    def get_current_stream(self, _device: int) -> int:
        return 0


def compile_launch(launch: Launch, architecture: int) -> Any:
    """Triton's compiled kernel, as this launch would have it."""
    kernel = _kernels()[launch.kernel]
    driver: Any = _Driver(architecture)
    triton.runtime.driver.set_active(driver)
    return kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options)


@functools.cache
def _kernels() -> dict[str, Any]:
    load_kernels()
    modules = [module for name, module in sys.modules.items() if name.startswith("engine.kernels.")]
    return {name: value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")}


def quick_pairs() -> list[tuple[Configuration, int]]:
    """Configurations, and an architecture for each, that take a minute and show most.

    Of each kernel one in float16 on Hopper for each head size and each way that a product ends, and one in bfloat16 on
    the oldest card; in float32 DCI's, which need most shared memory, where least is.
    """
    pairs, met = [], set()
    for dtype, architecture in (("fp16", 90), ("bf16", 80), ("fp32", 86)):
        for one in configurations(architecture=architecture):
            options, arguments = one.launch.options, one.launch.arguments
            ways = [options.get(name) for name in _TELLING] + [arguments.get(name) is None for name in _OPERANDS]
            key = one.launch.kernel, dtype, *(ways if dtype == "fp16" else ())
            is_asked = dtype != "fp32" or (one.launch.kernel.startswith("_dbim") and options["D"] == 160)
            if one.dtype == dtype and is_asked and key not in met:
                met.add(key)
                pairs.append((one, architecture))
    return pairs


_TELLING, _OPERANDS = ("D", "GATED", "TMA", "PARTIAL"), ("z", "sums_ptr")


def compile_all(every: bool = False, architectures: Iterable[int] = ARCHITECTURES, quick: bool = False) -> list[Usage]:
    """Compile every configuration for every architecture, on all processors; if ``quick``, some of them."""
    pairs = quick_pairs() if quick else [(one, sm) for sm in architectures for one in configurations(every, sm)]
    torch.set_num_threads(1)  # forked processes have no other threads
    with ProcessPoolExecutor(mp_context=get_context("fork"), initializer=_keep, initargs=(pairs,)) as pool:
        return list(pool.map(_compile, range(len(pairs))))


_PAIRS: list[tuple[Configuration, int]] = []


def _keep(pairs: list[tuple[Configuration, int]]) -> None:
    _PAIRS[:] = pairs


def _compile(number: int) -> Usage:
    one, architecture = _PAIRS[number]
    return usage_of(one, architecture, compile_launch(one.launch, architecture))


def usage_of(one: Configuration, architecture: int, compiled: Any) -> Usage:
    """What a compiled kernel takes."""
    code, taken = disassemble(compiled), resources(compiled)
    return Usage(
        kernel=one.launch.kernel,
        dtype=one.dtype,
        numbers=one.numbers,
        constants=one.constants,
        architecture=architecture,
        registers=taken["registers"],
        shared_bytes=taken["shared_bytes"],
        spill_instructions=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        warp_group_products=len(re.findall(r"\b(?:HGMMA|QGMMA)\b", code)),
        warp_products=len(re.findall(r"\bHMMA\b", code)),
    )


def disassemble(compiled: Any) -> str:
    """A kernel's instructions, as nvdisasm prints them."""
    return _told("nvdisasm", "--print-code", compiled)


def resources(compiled: Any) -> dict[str, int]:
    """Of a thread, registers and bytes of its stack, where spills go; of a block, bytes of shared memory."""
    told = _told("cuobjdump", "--dump-resource-usage", compiled)
    registers, stack = re.search(r"\bREG:(\d+)", told), re.search(r"\bSTACK:(\d+)", told)
    assert registers is not None
    assert stack is not None
    shared = compiled.metadata.shared
    return {"registers": int(registers[1]), "stack_bytes": int(stack[1]), "shared_bytes": shared}


def _told(tool: str, option: str, compiled: Any) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return _run(tool, option, file.name)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", action="store_true", help="other sizes, texts, numbers of pictures and models, too")
    parser.add_argument("--quick", action="store_true", help="some of them, on one architecture each")
    parser.add_argument("--architectures", type=int, nargs="*", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    usages = compile_all(arguments.every, arguments.architectures, arguments.quick)
    if arguments.json:
        print(json.dumps([asdict(usage) for usage in usages]))
        return 0
    print(f"triton {triton.__version__}")
    print(f"{'kernel':<34}{'dtype':<6}{'sm':<4}{'registers':>10}{'shared B':>10}{'spills':>8}{'HGMMA':>7}{'HMMA':>6}")
    for usage in usages:
        print(
            f"{usage.kernel:<34}{usage.dtype:<6}{usage.architecture:<4}{usage.registers:>10}{usage.shared_bytes:>10}"
            f"{usage.spill_instructions:>8}{usage.warp_group_products:>7}{usage.warp_products:>6}"
            f"  {usage.numbers} {usage.constants}"
        )
    return int(any(usage.spill_instructions for usage in usages))


if __name__ == "__main__":
    sys.exit(main())
