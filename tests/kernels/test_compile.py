"""Every kernel compiles for every architecture, without spills; no GPU is needed."""

import json
import os
import subprocess
import sys

from benchmarks.compile_kernels import ARCHITECTURES, MAX_SHARED_BYTES


def test_ahead_of_time_compilation() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_kernels", "--json"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    usages = json.loads(done.stdout)
    kernels = {usage["kernel"] for usage in usages}
    products = {"_cross_attention_fwd_kernel", "_cross_attention_pair_fwd_kernel", "_residual_apply_fwd_kernel"}
    products |= {"_dbim_space_kernel", "_dbim_mix_kernel", "_attention_fwd_kernel", "_product_kernel"}
    others = {"_geglu_fwd_kernel", "_group_norm_kernel", "_group_norm_stats_kernel", "_group_norm_apply_kernel"}
    others |= {"_layer_norm_stats_kernel", "_residual_add_fwd_kernel", "_attention_combine_kernel"}
    others |= {"_product_sum_kernel"}
    assert kernels == products | others
    assert {usage["dtype"] for usage in usages if usage["kernel"] in products} == {"fp16", "bf16", "fp32"}
    for kernel in kernels:
        assert {usage["architecture"] for usage in usages if usage["kernel"] == kernel} == set(ARCHITECTURES)
    for usage in usages:
        print(usage)
        assert usage["spill_instructions"] == 0, usage
        multiplies = usage["kernel"] in products and usage["dtype"] != "fp32"  # which has no exact tensor cores
        assert (usage["matrix_instructions"] > 0) == multiplies, usage
        if usage["kernel"] == "_product_kernel" and usage["architecture"] == 90:  # all of them at the full rate
            assert usage["group_instructions"] == usage["matrix_instructions"], usage
        assert 0 < usage["registers"] <= 255
        assert usage["shared_bytes"] <= MAX_SHARED_BYTES[usage["architecture"]], usage
