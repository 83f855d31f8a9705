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
from engine.kernels.cross_attention_pair import cross_attention_pair_triton
from engine.kernels.geglu import geglu_triton
from engine.kernels.jit import load_kernels

ARCHITECTURES = (80, 86, 89, 90)
MAX_SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}  # of a block, by NVIDIA's documentation
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_HEADS, _TEXT, _LONG_TEXT = 8, 77, 154
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


def configurations(every: bool = False) -> list[Configuration]:
    """What the engine launches for SD v1.5 at 512x512; also elsewhere, if ``every``.

    That is for several pictures, at a size whose halves are no multiples of 16, with long texts, and in the embedded
    model.
    """
    found: dict[Hashable, Configuration] = {}
    for name, dtype in DTYPES.items():
        for launch in _launches(dtype, every):
            if launch.is_ours:
                found.setdefault(key_of(launch), Configuration(name, launch))
    return list(found.values())


def _launches(dtype: torch.dtype, every: bool) -> Iterator[Launch]:
    for case in ("plain", "infusion", "dci"):
        yield from step_launches(SD_V1_5, dtype, case)
    yield from decode_launches(SD_V1_5_VAE, dtype, (64, 64))
    yield from _not_in_a_step(dtype)
    if not every:
        return
    for n in (2, 4):
        yield from step_launches(SD_V1_5, dtype, "plain", n)
    for case in ("plain", "infusion", "dci"):
        yield from step_launches(SD_V1_5, dtype, case, size=(72, 56))
        yield from step_launches(SD_V1_5, dtype, case, text_length=_LONG_TEXT)
        yield from step_launches(EMBEDDED, dtype, case)


@torch.no_grad()
def _not_in_a_step(dtype: torch.dtype) -> list[Launch]:
    """Kernels that stand beside those of a step: what the fused ones are held against."""
    recorder = Recorder()
    with recorder.recording():
        for N, C in _STAGES:
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
    kernel = _kernel(launch.kernel)
    triton.runtime.driver.set_active(_Driver(architecture))
    return kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options)


@functools.cache
def _kernels() -> dict[str, Any]:
    load_kernels()
    modules = [module for name, module in sys.modules.items() if name.startswith("engine.kernels.")]
    return {name: value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")}


def _kernel(name: str) -> Any:
    return _kernels()[name]


def quick_pairs(found: list[Configuration]) -> list[tuple[int, int]]:
    """Configurations by number, and architectures, that take a minute and show most.

    All in float16 on Hopper; in float32, where most shared memory is needed, those that need any, where least is; and
    of each kernel one in bfloat16 on the oldest.
    """
    pairs, met = [], set()
    for number, one in enumerate(found):
        kernel, dtype = one.launch.kernel, one.dtype
        group = kernel, one.launch.options.get("GROUP"), one.launch.options.get("HAS_SHIFT"), dtype
        if dtype == "bf16" and (kernel, dtype) not in met:
            pairs.append((number, 80))
        elif dtype == "fp32" and one.launch.options.get("PRECISION"):
            pairs.append((number, 86))
        elif dtype == "fp16" and ("GROUP" not in one.launch.options or group not in met):
            pairs.append((number, 90))
        met |= {group, (kernel, dtype)}
    return pairs


def compile_all(every: bool = False, architectures: Iterable[int] = ARCHITECTURES, quick: bool = False) -> list[Usage]:
    """Compile every configuration for every architecture, on all processors; if ``quick``, some of them."""
    found = configurations(every)
    pairs = quick_pairs(found) if quick else [(i, one) for i in range(len(found)) for one in architectures]
    torch.set_num_threads(1)  # forked processes have no other threads
    with ProcessPoolExecutor(mp_context=get_context("fork"), initializer=_keep, initargs=(found,)) as pool:
        return list(pool.map(_compile, *zip(*pairs, strict=True)))


_FOUND: list[Configuration] = []


def _keep(found: list[Configuration]) -> None:
    _FOUND[:] = found


def _compile(number: int, architecture: int) -> Usage:
    return usage_of(_FOUND[number], architecture, compile_launch(_FOUND[number].launch, architecture))


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
