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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.kernels import cross_attention, cross_attention_pair, dbim, geglu, group_norm_silu, residual_apply

ARCHITECTURES = (80, 86, 89, 90)
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_DTYPES = ("fp16", "bf16")


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


def configurations() -> Iterator[tuple[Any, str, dict[str, str], dict[str, Any]]]:
    """Kernel, dtype, argument types and constants of every launch; "num_warps" where it is not Triton's default."""
    tile = {"BLOCK_N": group_norm_silu._BLOCK_N, "BLOCK_C": group_norm_silu._BLOCK_C}
    for dtype in _DTYPES:
        data = f"*{dtype}"
        yield geglu._geglu_fwd_kernel, dtype, {"x_ptr": data, "y_ptr": data, "n_cols": "i32"}, {"BLOCK": geglu._BLOCK}
        stats = {"x_ptr": data, "mean_ptr": "*fp32", "m2_ptr": "*fp32", "N": "i32", "C": "i32"}
        yield group_norm_silu._group_norm_stats_kernel, dtype, stats, tile
        apply = {"x_ptr": data, "centre_ptr": "*fp32", "scale_ptr": "*fp32", "bias_ptr": data, "y_ptr": data}
        apply |= {"N": "i32", "C": "i32"}
        yield group_norm_silu._group_norm_silu_apply_kernel, dtype, apply, tile
    combine = dict.fromkeys(("mean_ptr", "m2_ptr", "weight_ptr", "centre_ptr", "scale_ptr"), "*fp32")
    combine |= {"weight_ptr": "*fp16"}  # the statistics are float32 at every dtype
    combine |= {"N": "i32", "C": "i32", "n_chunks": "i32", "eps": "fp32"}
    for group in (4, 10, 20, 60, 80):  # channels a group in SD v1.5's UNet and VAE, one per power of two above
        constants = {
            "GROUP": group,
            "BLOCK_N": group_norm_silu._BLOCK_N,
            "BLOCK_G": triton.next_power_of_2(group),
            "BLOCK_CHUNKS": group_norm_silu._BLOCK_CHUNKS,
        }
        yield group_norm_silu._group_norm_combine_kernel, "fp16", combine, constants
    yield from _attention_configurations()


def _attention_configurations() -> Iterator[tuple[Any, str, dict[str, str], dict[str, Any]]]:
    """Head dims of SD v1.5 and of the embedded model, over 77 keys."""
    sizes = dict.fromkeys(("N", "S", "C", "T"), "i32")
    for dtype in _DTYPES:
        data = f"*{dtype}"
        inputs = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), data) | {"tokens_ptr": "*i64"}
        for head_dim in (16, 40, 80, 160):
            constants = cross_attention.tile(torch.empty(1, 1, head_dim), torch.empty(1, 77, head_dim), 1)
            constants["PRECISION"] = "tf32"  # means nothing in half precision
            types = inputs | {"out_ptr": data, "columns_ptr": data} | sizes | {"n_heads": "i32", "scale": "fp32"}
            yield cross_attention._cross_attention_fwd_kernel, dtype, types, constants
            types = inputs | {"residuals_ptr": data, "out_ptr": data, "out_residual_ptr": data} | sizes
            types |= {"scale": "fp32"}
            yield cross_attention_pair._cross_attention_pair_fwd_kernel, dtype, types, constants
            yield from _dbim_configurations(dtype, head_dim)
        types = {"x_ptr": data, "out_ptr": data, "columns_ptr": data, "leaders_ptr": "*i64", "residuals_ptr": data}
        types |= {"y_ptr": data, "N": "i32", "C": "i32", "K": "i32"}
        constants = {
            "BLOCK_N": residual_apply._BLOCK_N,
            "BLOCK_C": residual_apply._BLOCK_C,
            "BLOCK_K": residual_apply._BLOCK_K,
            "PRECISION": "tf32",
        }
        yield residual_apply._residual_apply_fwd_kernel, dtype, types, constants


def _dbim_configurations(dtype: str, head_dim: int) -> Iterator[tuple[Any, str, dict[str, str], dict[str, Any]]]:
    """Both passes of one head dim, gated as calibrated; the printed form only at SD v1.5's finest layers."""
    data, sizes = f"*{dtype}", dict.fromkeys(("N", "S", "C", "n_heads", "n_pairs"), "i32") | {"scale": "fp32"}
    masks = {"chosen_ptr": "*i1", "lengths_ptr": "*i64", "gates_ptr": "*fp32"}
    space = dict.fromkeys(("q_ptr", "k_ptr"), data) | masks | {"partial_ptr": "*fp32"} | sizes
    mix = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), data) | masks | {"partial_ptr": "*fp32", "out_ptr": data} | sizes
    tile: dict[str, Any] = dbim.tile_pair(torch.empty(1, 1, head_dim), torch.empty(1, 77, head_dim), 1)
    tile["PRECISION"] = "tf32"  # means nothing in half precision
    for logits in (False, True) if head_dim == 40 else (False,):
        yield dbim._dbim_space_kernel, dtype, space, tile | {"LOGITS": logits}
        yield dbim._dbim_mix_kernel, dtype, mix, tile | {"LOGITS": logits, "BLOCK_BLOCKS": 64}


def compile_all() -> Iterator[Usage]:
    """Compile every configuration for every architecture."""
    for kernel, dtype, types, constants in configurations():
        options = {name: value for name, value in constants.items() if name == "num_warps"}
        constexprs = {name: value for name, value in constants.items() if name not in options}
        signature = types | dict.fromkeys(constexprs, "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind.startswith("*")}
        for architecture in ARCHITECTURES:
            source = ASTSource(kernel, signature, constexprs=constexprs, attrs=aligned)
            compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
            yield _usage(kernel.__name__, dtype, constants, architecture, compiled)


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
