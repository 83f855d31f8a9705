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
from collections.abc import Iterator, Mapping
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
    layer_norm_linear,
    product,
    residual_add,
    residual_apply,
)
from engine.kernels.jit import load_kernels
from engine.kernels.product_tiles import CARDS, best_tile, has_descriptors

load_kernels()

ARCHITECTURES = (80, 86, 89, 90)
MAX_SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}  # of a block, by NVIDIA's documentation
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_HALVES = ("fp16", "bf16")


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
    group_instructions: int  # of these, those of whole warp groups, which Hopper's full rate takes


# Kernel, dtype, arguments (a type, a number of a launch for SD v1.5 at 512x512, None), constants and options, and the
# architectures that launch it so
Configuration = tuple[Any, str, Mapping[str, str | int | None], dict[str, Any], tuple[int, ...]]
_POSITIONS, _WIDTH, _TEXT, _HEADS = 4096, 320, 77, 8


def configurations() -> Iterator[Configuration]:
    """Every launch the engine would make."""
    for dtype in _HALVES:
        data = f"*{dtype}"
        yield (
            geglu._geglu_fwd_kernel,
            dtype,
            {"x_ptr": data, "y_ptr": data, "n_cols": 4 * _WIDTH},
            {"BLOCK": geglu._BLOCK},
            ARCHITECTURES,
        )
        add = dict.fromkeys(("x_ptr", "residual_ptr", "bias_ptr", "y_ptr"), data) | {
            "n_values": 2 * _POSITIONS * _WIDTH,
            "C": _WIDTH,
        }
        yield residual_add._residual_add_fwd_kernel, dtype, add, {"BLOCK": residual_add._BLOCK}, ARCHITECTURES
        yield from _norm_configurations(dtype)
        yield from _product_configurations(dtype)
    yield from _statistics_configurations()
    yield from _attention_configurations()
    yield from _product_configurations("fp32")
    yield from _dbim_configurations("fp32", 160)  # which needs most of the shared memory that small cards have


def _norm_configurations(dtype: str) -> Iterator[Configuration]:
    data, tile = f"*{dtype}", {"BLOCK_N": group_norm_silu._BLOCK_N, "BLOCK_C": group_norm_silu._BLOCK_C}
    stats = {"x_ptr": data, "mean_ptr": "*fp32", "m2_ptr": "*fp32", "N": _POSITIONS, "C": _WIDTH}
    yield group_norm_silu._group_norm_stats_kernel, dtype, stats, tile, ARCHITECTURES
    apply = {
        "x_ptr": data,
        "shift_ptr": data,
        "centre_ptr": "*fp32",
        "scale_ptr": "*fp32",
        "bias_ptr": data,
        "y_ptr": data,
    }
    apply |= {"N": _POSITIONS, "C": _WIDTH, "stride_shift": 16160}
    for silu in (False, True):  # the one has a shift too
        yield (
            group_norm_silu._group_norm_apply_kernel,
            dtype,
            apply,
            {"HAS_SHIFT": silu, "SILU": silu} | tile,
            ARCHITECTURES,
        )


def _statistics_configurations() -> Iterator[Configuration]:
    """All in float32, but for what they load."""
    dtype, data = "fp16", "*fp16"
    combine = {"mean_ptr": "*fp32", "m2_ptr": "*fp32", "shift_ptr": data, "weight_ptr": data, "centre_ptr": "*fp32"}
    combine |= {
        "scale_ptr": "*fp32",
        "N": _POSITIONS,
        "C": _WIDTH,
        "n_chunks": 64,
        "stride_shift": 16160,
        "eps": "fp32",
    }
    for group in (4, 10, 20, 60, 80):  # channels a group in SD v1.5's UNet and VAE, one per power of two above
        tile = {"BLOCK_N": group_norm_silu._BLOCK_N, **group_norm_silu.group_tile(group)}
        constants = {"HAS_SHIFT": True, **tile}
        yield group_norm_silu._group_norm_combine_kernel, dtype, combine, constants, ARCHITECTURES
    rows = {"x_ptr": data, "stats_ptr": "*fp32", "M": 2 * _POSITIONS, "K": _WIDTH, "eps": "fp32"}
    for width in (320, 640, 1280):
        constants = {"BLOCK_M": layer_norm_linear._BLOCK_ROWS, "BLOCK_K": triton.next_power_of_2(width)}
        yield layer_norm_linear._layer_norm_stats_kernel, dtype, rows, constants, ARCHITECTURES


def _product_configurations(dtype: str) -> Iterator[Configuration]:
    """Of a guided step, by each card's tiles; on Hopper, the pointers' form that calibration knows, too."""
    found = []
    for generation, card in CARDS.items():
        for described in (True, False) if has_descriptors(card) else (False,):
            for one in _products(_DTYPES[dtype]):
                tile = best_tile(*one.sizes, one.x.dtype, one.gated, card, described)
                y = one.x.new_empty(*one.sizes[:2], dtype=torch.float32 if tile.splits > 1 else one.x.dtype)
                given, constants = product.launch_arguments(one, y, tile)
                arguments = dict(zip(product._product_kernel.arg_names, map(_type_of, given), strict=False))
                configuration = (product._product_kernel, dtype, arguments, constants, (generation,))
                if _specialised(configuration) not in map(_specialised, found):
                    found.append(configuration)
    yield from found
    tile = {"BLOCK_M": product._BLOCK_SUM_M, "BLOCK_N": product._BLOCK_SUM_N}
    for one in _products(_DTYPES[dtype]):
        after = (one.bias, one.residual, one.stats, one.sums, one.x.new_empty(0))
        arguments = {"partial_ptr": "*fp32"} | dict(zip(_AFTER, map(_type_of, after), strict=True))
        sizes = {"M": one.sizes[0], "N": one.sizes[1], "n_splits": 4}
        if len(one.x) == _SPLIT_ROWS:
            yield product._product_sum_kernel, dtype, arguments | sizes, {"GATED": one.gated, **tile}, ARCHITECTURES


_AFTER = ("bias_ptr", "residual_ptr", "stats_ptr", "sums_ptr", "y_ptr")
_SPLIT_ROWS = 128


def _products(dtype: torch.dtype) -> Iterator[product.Product]:
    """Those of a guided step of SD v1.5, two rows: queries, keys and values; queries; both outputs; gated rows."""

    def empty(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    for positions, C in ((4096, 320), (1024, 640), (256, 1280), (64, 1280)):
        M = 2 * positions
        for rows in (3 * C, C, 8 * C):
            weight = empty(rows, C)
            folded: dict[str, Any] = {
                "stats": empty(M, 2, dtype=torch.float32),
                "sums": empty(2 * rows + 1, dtype=torch.float32),
            }
            after = folded if dtype != torch.float32 else {"bias": empty(rows)} if rows == 8 * C else {}
            yield product.Product(empty(M, C), weight, gated=rows == 8 * C, **after)
        after: dict[str, Any] = {"bias": empty(C), "residual": empty(M, C)}
        yield product.Product(empty(M, C), empty(C, C), **after)
        yield product.Product(empty(M, 4 * C), empty(C, 4 * C), empty(M, C), empty(C, C), **after)


_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def _type_of(x: Any) -> str | int | None:
    """An argument as a configuration has it."""
    if isinstance(x, torch.Tensor):
        return f"*{_NAMES[x.dtype]}"
    if x is None or isinstance(x, int):
        return x
    return f"tensordesc<{_NAMES[x.base.dtype]}{list(x.block_shape)}>"


def _specialised(configuration: Configuration) -> tuple[Any, ...]:
    """The same for what Triton compiles alike."""
    kernel, dtype, arguments, constants, architectures = configuration
    numbers = ((1 if x == 1 else x % 16 == 0) if isinstance(x, int) else x for x in arguments.values())
    return kernel.__name__, dtype, tuple(numbers), tuple(constants.items()), architectures


def _attention_configurations() -> Iterator[Configuration]:
    """Head dims of SD v1.5 and of the embedded model, over 77 keys."""
    sizes = {"N": _POSITIONS, "S": _TEXT, "C": _WIDTH, "T": 2}
    for dtype in _HALVES:
        kind = _DTYPES[dtype]
        data = f"*{dtype}"
        types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), data)
        types |= {"N": _POSITIONS, "S": _POSITIONS, "C": _WIDTH}
        types |= dict.fromkeys(("stride_q", "stride_k", "stride_v"), 3 * _WIDTH) | {"scale": "fp32"}
        for head_dim in (16, 40, 80, 160):
            constants = attention.tile(head_dim, kind)
            yield attention._attention_fwd_kernel, dtype, types, constants, ARCHITECTURES
        inputs = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), data) | {"tokens_ptr": "*i64"}
        for head_dim in (16, 40, 80, 160):
            constants = cross_attention.tile(*_queries_and_keys(dtype, head_dim), 1)
            types = inputs | {"out_ptr": data, "columns_ptr": data} | sizes | {"n_heads": _HEADS, "scale": "fp32"}
            yield cross_attention._cross_attention_fwd_kernel, dtype, types, constants, ARCHITECTURES
            types = inputs | {"residuals_ptr": data, "out_ptr": data, "out_residual_ptr": data} | sizes
            types |= {"scale": "fp32"}
            yield cross_attention_pair._cross_attention_pair_fwd_kernel, dtype, types, constants, ARCHITECTURES
            yield from _dbim_configurations(dtype, head_dim)
        types = {"x_ptr": data, "out_ptr": data, "columns_ptr": data, "leaders_ptr": "*i64", "residuals_ptr": data}
        types |= {"y_ptr": data, "N": _POSITIONS, "C": _WIDTH, "K": _HEADS}
        constants = {
            "BLOCK_N": residual_apply._BLOCK_N,
            "BLOCK_C": residual_apply._BLOCK_C,
            "BLOCK_K": residual_apply._BLOCK_K,
            "PRECISION": product.precision(kind),
        }
        yield residual_apply._residual_apply_fwd_kernel, dtype, types, constants, ARCHITECTURES


def _queries_and_keys(dtype: str, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    kind = _DTYPES[dtype]
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
        yield dbim._dbim_space_kernel, dtype, space, tile | {"LOGITS": logits}, ARCHITECTURES
        yield dbim._dbim_mix_kernel, dtype, mix, tile | {"LOGITS": logits, "BLOCK_BLOCKS": 64}, ARCHITECTURES


def compile_all() -> Iterator[Usage]:
    """Compile every configuration for every architecture, on all processors."""
    numbers = range(len(list(configurations())))
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        for usages in pool.map(_compile, numbers):
            yield from usages


def _compile(number: int) -> list[Usage]:
    """One configuration for its architectures, specialised as Triton does at a launch: on 1, on multiples of 16."""
    kernel, dtype, arguments, constants, architectures = next(islice(configurations(), number, None))
    options = {name: value for name, value in constants.items() if name in ("num_warps", "num_stages")}
    constexprs = {name: value for name, value in constants.items() if name not in options}
    constexprs |= {name: value for name, value in arguments.items() if value is None or value == 1}
    types = {name: "i32" if isinstance(kind, int) else kind for name, kind in arguments.items()}
    signature = types | dict.fromkeys(constexprs, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(arguments.items())
        if name not in constexprs and (kind % 16 == 0 if isinstance(kind, int) else str(kind).startswith("*"))
    }
    usages = []
    for architecture in architectures:
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
        group_instructions=len(re.findall(r"\b(?:HGMMA|QGMMA)\b", code)),
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> int:
    usages = list(compile_all())
    if "--json" in sys.argv[1:]:
        print(json.dumps([asdict(usage) for usage in usages]))
        return 0
    names = f"{'registers':>10}{'shared B':>10}{'spills':>8}{'mma':>6}{'wgmma':>6}  constants"
    print(f"{'kernel':<34}{'dtype':<6}{'sm':<4}{names}")
    for usage in usages:
        print(
            f"{usage.kernel:<34}{usage.dtype:<6}{usage.architecture:<4}{usage.registers:>10}{usage.shared_bytes:>10}"
            f"{usage.spill_instructions:>8}{usage.matrix_instructions:>6}{usage.group_instructions:>6}"
            f"  {usage.constants}"
        )
    return int(any(usage.spill_instructions for usage in usages))


if __name__ == "__main__":
    sys.exit(main())
