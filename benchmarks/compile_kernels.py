"""Compile every Triton kernel ahead of time, on any machine: ``python -m benchmarks.compile_kernels``.

Builds real cubins for each architecture in the configurations that the engine launches for SD v1.5, and prints
registers as the cubin states them, shared memory as Triton asks for it, spills as the instructions in it that touch
local memory, and matrix products as its tensor-core instructions.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.kernels import (
    attention,
    cross_attention,
    cross_attention_pair,
    dbim,
    geglu,
    group_norm_silu,
    layer_norm_geglu,
    layer_norm_linear,
    linear_add,
    residual_add,
    residual_apply,
)
from engine.kernels.jit import load_kernels

load_kernels()

ARCHITECTURES = (80, 86, 89, 90)
MAX_SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}  # of a block, by NVIDIA's documentation
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Usage:
    """What one kernel takes on one architecture."""

    kernel: str
    dtype: str
    constants: str
    architecture: int
    registers: int
    shared_bytes: int
    spill_instructions: int
    matrix_instructions: int


# Kernel, dtype, arguments (a type, or a number of a launch for SD v1.5 at 512x512), constants and options
Configuration = tuple[Any, str, dict[str, str | int], dict[str, Any]]
_POSITIONS, _WIDTH, _TEXT, _HEADS, _GROUPS = 4096, 320, 77, 8, 32


def configurations() -> Iterator[Configuration]:
    """Every launch the engine would make."""
    for dtype in _DTYPES:
        data = f"*{dtype}"
        yield (
            geglu._geglu_fwd_kernel,
            dtype,
            {"x_ptr": data, "y_ptr": data, "n_cols": 4 * _WIDTH},
            {"BLOCK": geglu._BLOCK},
        )
        add = dict.fromkeys(("x_ptr", "residual_ptr", "bias_ptr", "y_ptr"), data) | {
            "n_values": 2 * _POSITIONS * _WIDTH,
            "C": _WIDTH,
        }
        yield residual_add._residual_add_fwd_kernel, dtype, add, {"BLOCK": residual_add._BLOCK}
        yield from _product_configurations(dtype)
    yield from _norm_configurations()
    yield from _statistics_configurations()
    yield from _attention_configurations()
    yield from _dbim_configurations("fp32", 160)  # which needs most of the shared memory that small cards have


# By positions, the channels of SD v1.5's UNet that its GroupNorms see there
_NORMS = {4096: (320, 640, 960), 1024: (320, 640, 960, 1280, 1920), 256: (640, 1280, 1920, 2560), 64: (1280, 2560)}
_PICTURE = {1 << 18: (128, 256), 1 << 16: (256, 512)}  # and of its VAE's


def _norm_configurations() -> Iterator[Configuration]:
    """Each that differs, in both ways where calibration times both; other dtypes than float16 at one size."""
    known: list[dict[str, Any]] = []
    for dtype in ("fp16", "bf16", "fp32"):
        for positions, widths in (_NORMS | _PICTURE if dtype == "fp16" else {1024: _NORMS[1024]}).items():
            for width in widths:
                found = [_norm_alone(dtype, positions, width)] if positions <= 4096 else []
                found += _norm_shared(dtype, positions, width) if positions >= 1024 else []
                for kernel, _, types, constants in found:
                    if (one := {"kernel": kernel, "dtype": dtype} | constants) not in known:
                        known.append(one)
                        yield kernel, dtype, types, constants


def _norm_alone(dtype: str, positions: int, width: int) -> Configuration:
    types = dict.fromkeys(("x_ptr", "shift_ptr", "weight_ptr", "bias_ptr", "y_ptr"), f"*{dtype}")
    types |= _norm_sizes(positions, width) | {"eps": "fp32", "silu": "fp32"}
    return group_norm_silu._group_norm_kernel, dtype, types, group_norm_silu.alone_tile(positions, width // _GROUPS)


def _norm_shared(dtype: str, positions: int, width: int) -> Iterator[Configuration]:
    tile = group_norm_silu.shared_tile(positions, width // _GROUPS, _GROUPS)
    chunk, n_chunks = group_norm_silu.chunks_of(positions, tile["BLOCK_N"])
    data, sizes = f"*{dtype}", _norm_sizes(positions, width) | {"chunk": chunk}
    types = {"x_ptr": data, "shift_ptr": data, "mean_ptr": "*fp32", "m2_ptr": "*fp32"}
    yield group_norm_silu._group_norm_stats_kernel, dtype, types | sizes, tile
    types |= dict.fromkeys(("weight_ptr", "bias_ptr", "y_ptr"), data) | sizes | {"eps": "fp32", "silu": "fp32"}
    yield group_norm_silu._group_norm_apply_kernel, dtype, types, tile | {"BLOCK_CHUNKS": max(64, n_chunks)}


def _norm_sizes(positions: int, width: int) -> dict[str, str | int]:
    return {"N": positions, "C": width, "n_shifted": width, "stride_shift": 16160}


def _statistics_configurations() -> Iterator[Configuration]:
    """All in float32, but for what they load."""
    dtype, data = "fp16", "*fp16"
    rows = {"x_ptr": data, "stats_ptr": "*fp32", "M": 2 * _POSITIONS, "K": _WIDTH, "eps": "fp32"}
    for width in (320, 640, 1280):
        constants = {"BLOCK_M": layer_norm_linear._BLOCK_ROWS, "BLOCK_K": triton.next_power_of_2(width)}
        yield layer_norm_linear._layer_norm_stats_kernel, dtype, rows, constants


def _product_configurations(dtype: str) -> Iterator[Configuration]:
    data, sizes = f"*{dtype}", {"M": 2 * _POSITIONS, "N": _WIDTH, "K": _WIDTH}
    precision = {"PRECISION": layer_norm_linear.precision(_DTYPES[dtype])}
    norm = {"x_ptr": data, "stats_ptr": "*fp32", "norm_weight_ptr": data, "norm_bias_ptr": data, "weight_ptr": data}
    types = norm | {"y_ptr": data} | sizes
    yield layer_norm_linear._layer_norm_linear_fwd_kernel, dtype, types, layer_norm_linear._TILE | precision
    types = norm | {"bias_ptr": data, "y_ptr": data} | sizes
    yield layer_norm_geglu._layer_norm_geglu_fwd_kernel, dtype, types, layer_norm_geglu._TILE | precision
    pointers = ("x_ptr", "weight_ptr", "z_ptr", "z_weight_ptr", "bias_ptr", "residual_ptr", "y_ptr")
    types = dict.fromkeys(pointers, data) | sizes | {"K_z": 4 * _WIDTH}
    yield linear_add._linear_add_fwd_kernel, dtype, types, linear_add._TILE | precision


def _attention_configurations() -> Iterator[Configuration]:
    """Head dims of SD v1.5 and of the embedded model, over 77 keys."""
    sizes = {"N": _POSITIONS, "S": _TEXT, "C": _WIDTH, "T": 2}
    for dtype, kind in _DTYPES.items():
        data = f"*{dtype}"
        yield from _self_attention_configurations(dtype, kind)
        inputs = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), data) | {"tokens_ptr": "*i64"}
        for head_dim in (16, 40, 80, 160):
            constants = cross_attention.tile(*_queries_and_keys(dtype, head_dim), 1)
            types = inputs | {"out_ptr": data, "columns_ptr": data} | sizes | {"n_heads": _HEADS, "scale": "fp32"}
            yield cross_attention._cross_attention_fwd_kernel, dtype, types, constants
            types = inputs | {"residuals_ptr": data, "out_ptr": data, "out_residual_ptr": data} | sizes
            types |= {"scale": "fp32"}
            yield cross_attention_pair._cross_attention_pair_fwd_kernel, dtype, types, constants
            yield from _dbim_configurations(dtype, head_dim)
        types = {"x_ptr": data, "out_ptr": data, "columns_ptr": data, "leaders_ptr": "*i64", "residuals_ptr": data}
        types |= {"y_ptr": data, "N": _POSITIONS, "C": _WIDTH, "K": _HEADS}
        constants = {
            "BLOCK_N": residual_apply._BLOCK_N,
            "BLOCK_C": residual_apply._BLOCK_C,
            "BLOCK_K": residual_apply._BLOCK_K,
            "PRECISION": layer_norm_linear.precision(kind),
        }
        yield residual_apply._residual_apply_fwd_kernel, dtype, types, constants


def _self_attention_configurations(dtype: str, kind: torch.dtype) -> Iterator[Configuration]:
    """Two rows at the sizes of SD v1.5 at 512x512, then at one with keys to spare; split where programs are few."""
    for N in (4096, 1024, 256, 64, 5400, 1350, 350, 96):
        head_dim = 40 if N >= 4096 else 80 if N >= 1024 else 160
        q = torch.empty(2, N, _HEADS * head_dim, dtype=kind, device="meta")
        for is_split in (False, True) if head_dim == 160 else (False,):
            constants, parts, part = attention.launch_of(q, q, _HEADS, is_split)
            data, into, C = f"*{dtype}", "*fp32" if parts > 1 else f"*{dtype}", q.shape[2]
            types: dict[str, str | int] = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), data) | dict.fromkeys(
                ("out_ptr", "max_ptr", "sum_ptr"), into
            )
            types |= {"N": N, "S": N, "C": C} | dict.fromkeys(("stride_q", "stride_k", "stride_v"), 3 * C)
            yield attention._attention_fwd_kernel, dtype, types | {"scale": "fp32", "part": part}, constants
            if parts > 1 and N in (256, 64):
                types = dict.fromkeys(("part_ptr", "max_ptr", "sum_ptr"), "*fp32") | {"out_ptr": data, "N": N, "C": C}
                sizes = {"D": head_dim, "BLOCK_D": 256, "BLOCK_N": attention._COMBINED, "PARTS": parts}
                yield attention._attention_combine_kernel, dtype, types, sizes
    q = torch.empty(2, 256, 128, dtype=kind, device="meta")
    constants, *_ = attention.launch_of(q, q, _HEADS, is_split=False)
    sizes = {"N": 256, "S": 256, "C": 128, "stride_q": 384, "stride_k": 384, "stride_v": 384}
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr", "max_ptr", "sum_ptr"), f"*{dtype}")
    yield attention._attention_fwd_kernel, dtype, types | sizes | {"scale": "fp32", "part": 256}, constants


def _queries_and_keys(dtype: str, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    kind = _DTYPES.get(dtype, torch.float32)
    return torch.empty(1, 1, head_dim, dtype=kind), torch.empty(1, _TEXT, head_dim, dtype=kind)


def _dbim_configurations(dtype: str, head_dim: int) -> Iterator[Configuration]:
    """Both passes of one head dim, gated as calibrated; the printed form only at SD v1.5's finest layers."""
    data, sizes = f"*{dtype}", {"N": _POSITIONS, "S": _TEXT, "C": _WIDTH, "n_heads": _HEADS, "n_pairs": 2}
    sizes |= {"scale": "fp32"}
    masks = {"chosen_ptr": "*i1", "lengths_ptr": "*i64", "gates_ptr": "*fp32"}
    space = dict.fromkeys(("q_ptr", "k_ptr"), data) | masks | {"partial_ptr": "*fp32"} | sizes
    mix = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), data) | masks | {"partial_ptr": "*fp32", "out_ptr": data} | sizes
    tile: dict[str, Any] = dbim.tile_pair(*_queries_and_keys(dtype, head_dim), 1)
    for logits in (False, True) if head_dim == 40 else (False,):
        yield dbim._dbim_space_kernel, dtype, space, tile | {"LOGITS": logits}
        yield dbim._dbim_mix_kernel, dtype, mix, tile | {"LOGITS": logits, "BLOCK_BLOCKS": 64}


def compile_all() -> Iterator[Usage]:
    """Compile every configuration for every architecture, on all processors."""
    numbers = range(len(list(configurations())))
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        for usages in pool.map(_compile, numbers):
            yield from usages


def _compile(number: int) -> list[Usage]:
    """One configuration for every architecture, specialised as Triton does when it launches: on multiples of 16."""
    kernel, dtype, arguments, constants = next(islice(configurations(), number, None))
    options = {name: value for name, value in constants.items() if name in ("num_warps", "num_stages")}
    constexprs = {name: value for name, value in constants.items() if name not in options}
    types = {name: "i32" if isinstance(kind, int) else kind for name, kind in arguments.items()}
    signature = types | dict.fromkeys(constexprs, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(arguments.values())
        if (kind % 16 == 0 if isinstance(kind, int) else kind.startswith("*"))
    }
    usages = []
    for architecture in ARCHITECTURES:
        source = ASTSource(kernel, signature, constexprs=constexprs, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        usages.append(_usage(kernel.__name__, dtype, constants, architecture, compiled))
    return usages


def _usage(kernel: str, dtype: str, constants: dict[str, Any], architecture: int, compiled: Any) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", "--print-code", file.name)
    registers = re.search(r"\bREG:(\d+)", usage)
    assert registers is not None
    return Usage(
        kernel=kernel,
        dtype=dtype,
        constants=" ".join(f"{name}={value}" for name, value in constants.items()),
        architecture=architecture,
        registers=int(registers[1]),
        shared_bytes=compiled.metadata.shared,
        spill_instructions=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        matrix_instructions=len(re.findall(r"\b(?:HMMA|HGMMA|QGMMA)\b", code)),
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> int:
    usages = list(compile_all())
    if "--json" in sys.argv[1:]:
        print(json.dumps([asdict(usage) for usage in usages]))
        return 0
    print(f"{'kernel':<34}{'dtype':<6}{'sm':<4}{'registers':>10}{'shared B':>10}{'spills':>8}{'mma':>6}  constants")
    for usage in usages:
        print(
            f"{usage.kernel:<34}{usage.dtype:<6}{usage.architecture:<4}{usage.registers:>10}{usage.shared_bytes:>10}"
            f"{usage.spill_instructions:>8}{usage.matrix_instructions:>6}  {usage.constants}"
        )
    return int(any(usage.spill_instructions for usage in usages))


if __name__ == "__main__":
    sys.exit(main())
