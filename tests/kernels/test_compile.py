"""Every kernel compiles for every architecture, without spills; no GPU is needed."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from benchmarks.compile_kernels import (
    ARCHITECTURES,
    DTYPES,
    MAX_SHARED_BYTES,
    Configuration,
    configurations,
    key_of,
    quick_pairs,
)
from benchmarks.launches import SD_V1_5, step_launches

_PRODUCTS = {"_cross_attention_fwd_kernel", "_cross_attention_pair_fwd_kernel", "_residual_apply_fwd_kernel"}
_PRODUCTS |= {"_dbim_space_kernel", "_dbim_mix_kernel", "_attention_fwd_kernel", "_product_kernel"}
_OTHERS = {"_geglu_fwd_kernel", "_group_norm_kernel", "_group_norm_stats_kernel", "_group_norm_apply_kernel"}
_OTHERS |= {"_layer_norm_stats_kernel", "_residual_add_fwd_kernel", "_attention_combine_kernel", "_product_sum_kernel"}


def _compiled(*arguments: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile_kernels", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


_SPILL_IN_FLOAT32 = ("_attention_fwd_kernel", "_cross_attention_pair_fwd_kernel")  # right, and slower for it


def _check(usages: list[dict[str, Any]], all_in_warp_groups: bool) -> None:
    """No spills, and the products that a card has: of warp groups on Hopper, of warps on others, none in float32."""
    known = [usage for usage in usages if usage["dtype"] == "fp32" and usage["kernel"] in _SPILL_IN_FLOAT32]
    wrong = [usage for usage in usages if usage["spill_instructions"] and usage not in known]
    assert not wrong, "\n".join(map(str, wrong))
    for usage in usages:
        groups, warps = usage["warp_group_products"], usage["warp_products"]
        multiplies = usage["kernel"] in _PRODUCTS and usage["dtype"] != "fp32"  # which has no exact tensor cores
        assert (groups + warps > 0) == multiplies, usage
        assert not (groups and warps), usage
        assert not groups or usage["architecture"] == 90, usage
        if all_in_warp_groups and usage["architecture"] == 90:
            assert not warps, usage
        assert 0 < usage["registers"] <= 255
        assert usage["shared_bytes"] <= MAX_SHARED_BYTES[usage["architecture"]], usage


def test_ahead_of_time_compilation() -> None:
    """Float16 on Hopper, each kernel in bfloat16 on the oldest card, DCI's in float32 where shared memory is least."""
    usages = _compiled("--quick")
    assert {usage["kernel"] for usage in usages} == _PRODUCTS | _OTHERS
    for kernel in _PRODUCTS | _OTHERS:
        found = {usage["architecture"] for usage in usages if usage["kernel"] == kernel}
        assert found >= {80, 90}
    _check(usages, all_in_warp_groups=True)


@pytest.mark.slow
def test_every_configuration_compiles() -> None:
    """Also other sizes, long texts, more pictures, and the embedded model, whose tiles are too low for warp groups."""
    usages = _compiled("--every")
    kernels = {usage["kernel"] for usage in usages}
    assert kernels == _PRODUCTS | _OTHERS
    for kernel in kernels:
        mine = [usage for usage in usages if usage["kernel"] == kernel]
        assert {usage["architecture"] for usage in mine} == set(ARCHITECTURES)
        assert {usage["dtype"] for usage in mine} == set(DTYPES)
    _check(usages, all_in_warp_groups=False)


@pytest.fixture(scope="module")
def found() -> list[Configuration]:
    return configurations()


def _values(found: list[Configuration], kernel: str, name: str) -> set[Any]:
    mine = [one.launch for one in found if one.launch.kernel == kernel]
    return {(launch.options | launch.arguments)[name] for launch in mine}


def test_shapes_are_sd_v1_5s(found: list[Configuration]) -> None:
    assert {one.dtype for one in found} == set(DTYPES)
    for kernel in ("_attention_fwd_kernel", "_cross_attention_fwd_kernel", "_dbim_mix_kernel"):
        mine = {(one.launch.options["D"], one.launch.arguments["C"]) for one in found if one.launch.kernel == kernel}
        assert mine == {(40, 320), (80, 640), (160, 1280)}
    assert _values(found, "_attention_fwd_kernel", "S") >= {77, 4096, 1024, 256}
    groups = _values(found, "_group_norm_kernel", "GROUP") | _values(found, "_group_norm_apply_kernel", "GROUP")
    assert groups == {4, 8, 10, 16, 20, 30, 40, 60, 80}
    assert _values(found, "_layer_norm_stats_kernel", "BLOCK_K") == {512, 1024, 2048}
    assert 1 in _values(found, "_cross_attention_fwd_kernel", "T")  # which Triton compiles as a constant


def test_launches_that_triton_compiles_alike_are_one() -> None:
    """Told apart by constants, dtypes, and which numbers are 1 or divide by 16; by nothing else."""
    launches = [one for one in step_launches(SD_V1_5, torch.float16) if one.kernel == "_residual_add_fwd_kernel"]
    assert len({one.arguments["C"] for one in launches}) == 3
    assert len({key_of(one) for one in launches}) == 1
    odd = step_launches(SD_V1_5, torch.float16, size=(72, 56))
    even = {key_of(one) for one in step_launches(SD_V1_5, torch.float16) if one.kernel == "_attention_fwd_kernel"}
    assert len(even) == 6
    assert {key_of(one) for one in odd if one.kernel == "_attention_fwd_kernel"} - even  # 18 x 14 positions
    in_bf16 = step_launches(SD_V1_5, torch.bfloat16)
    assert {key_of(one) for one in in_bf16 if one.is_ours}.isdisjoint({key_of(one) for one in launches})


def test_quick_has_every_kernel_and_the_hard_cards() -> None:
    pairs = quick_pairs()
    assert len(pairs) < 60  # one or two seconds each, of a core
    asked = {(one.launch.kernel, one.dtype, architecture) for one, architecture in pairs}
    for kernel in _PRODUCTS | _OTHERS:
        assert {(kernel, "fp16", 90), (kernel, "bf16", 80)} <= asked
    assert {("_dbim_space_kernel", "fp32", 86), ("_dbim_mix_kernel", "fp32", 86)} <= asked
