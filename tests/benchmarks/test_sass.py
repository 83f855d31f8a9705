"""Predictions from machine code: loops are found, work is counted, and the largest bound is what counts."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_tables, report
from benchmarks.disassembly import Loop, count_families, parse
from benchmarks.interpreted import Counts, count_programs
from benchmarks.launches import Launch, Recorder
from benchmarks.machine import RESULTS
from benchmarks.ops import KERNELS
from benchmarks.sass import CardRates, Kernel, bounds, library_seconds

_CARD = CardRates(processors=10, hertz=1e9, flops=1e12, n_bytes=1e12, exps=16, issues=4, warp_products=0.5)


def _code(*lines: str) -> Any:
    listed = [line if line.startswith(".L") else f"        /*0010*/                   {line} ;" for line in lines]
    return parse("\n".join(["\t.target\tsm_90a", "kernel:", *listed]))


_LOOPS = (
    "MOV R1, c[0x0][0x28]",
    ".L_x_0:",
    "LDG.E R2, desc[UR4][R2.64]",
    ".L_x_1:",
    "HGMMA.64x32x16.F32 R56, gdesc[UR28], RZ, !UPT",
    "@!P0 MUFU.EX2 R3, R4",
    "@P2 BRA `(.L_x_1)",
    "FADD R1, R1, R2",
    "@P1 BRA `(.L_x_0)",
    "@P3 BRA `(.L_x_2)",
    "FADD R1, R1, R2",
    ".L_x_2:",
    "EXIT",
    ".L_x_3:",
    "BRA `(.L_x_3)",
    "NOP",
)


def test_loops_are_jumps_back() -> None:
    code = _code(*_LOOPS)
    assert code.loops == (Loop(2, 4), Loop(1, 6))
    assert [one.family for one in code.instructions] == (
        ["MOV", "LDG", "HGMMA", "MUFU", "BRA", "FADD", "BRA", "BRA", "FADD", "EXIT"]
    )
    assert code.main_loop() == Loop(2, 4)
    assert count_families(code.within(code.main_loop())) == {"HGMMA": 1, "MUFU": 1, "BRA": 1}


def test_the_main_loop_is_the_one_with_most_products() -> None:
    small = (".L_x_5:", "HMMA.16816.F32 R1, R2, R3, R4", "FADD R1, R1, R1", "FADD R1, R1, R1", "@P0 BRA `(.L_x_5)")
    large = (".L_x_6:", *(["HMMA.16816.F32 R1, R2, R3, R4"] * 2), "@P0 BRA `(.L_x_6)")
    code = _code(*small, *large, "EXIT")
    assert code.main_loop() == Loop(4, 6)
    assert _code(*small, "HGMMA.64x64x16.F32 R1, R2", "EXIT").main_loop() == Loop(0, 3)
    assert _code(".L_x_0:", "FADD R1, R1, R1", "@P0 BRA `(.L_x_0)", "HMMA.1688.F32.TF32 R1, R2").main_loop() is None
    assert _code("FADD R1, R1, R1", "EXIT").main_loop() is None
    assert _code(".L_x_0:", "FADD R1, R1, R1", "@P0 BRA `(.L_x_0)", "EXIT").main_loop() == Loop(0, 1)


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("HGMMA.64x256x16.F32", 2 * 64 * 256 * 16),  # of one warp group, which four warps are
        ("HGMMA.64x16x16.F32.BF16", 2 * 64 * 16 * 16),
        ("HMMA.16816.F32.BF16", 4 * 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 4 * 2 * 16 * 8 * 8),
        ("FFMA", 0),
    ],
)
def test_flops_of_an_instruction(name: str, flops: float) -> None:
    (one,) = _code(f"{name} R1, R2, R3").instructions
    assert one.flops(warps=4) == flops
    assert one.flops(warps=8) == 2 * flops


def _launch(grid: tuple[int, ...], n_bytes: int = 0, warps: int = 4) -> Launch:
    return Launch("_some_kernel", "some", {}, {"num_warps": warps}, grid, n_bytes, 0.0)


def test_what_holds_a_launch_back() -> None:
    kernel = Kernel.of(_code(*_LOOPS), warps=4)
    per_round = 2.0 * 64 * 32 * 16
    counts = Counts(flops=8 * per_round, loaded_bytes=1000, stored_bytes=24, iterations=3)
    assert kernel.trips(counts) == 8
    found = bounds(_launch((7, 3), n_bytes=10**9), kernel, counts, _CARD)
    assert found == {
        "tensor": pytest.approx(3 * 8 * per_round / 1e11),  # 21 programs on 10 processors
        "memory": pytest.approx(1024 * 21 / 1e12),
        "exp": pytest.approx(3 * 8 * 4 * 32 / 16 / 1e9),
        "issue": pytest.approx(3 * (10 + 7 * 3) * 4 / 4 / 1e9),
    }
    assert bounds(_launch((7, 3), n_bytes=500), kernel, counts, _CARD)["memory"] == pytest.approx(500 / 1e12)
    assert bounds(_launch((10,)), kernel, counts, _CARD)["tensor"] == pytest.approx(found["tensor"] / 3)


def test_products_of_single_warps_are_slower_and_loops_without_products_are_counted() -> None:
    lines = (".L_x_0:", "HMMA.16816.F32 R1, R2, R3, R4", "@P0 BRA `(.L_x_0)", "EXIT")
    kernel, counts = Kernel.of(_code(*lines), warps=4), Counts(flops=1e6)
    assert bounds(_launch((1,)), kernel, counts, _CARD)["tensor"] == pytest.approx(1e6 / (0.5 * 1e11))
    plain = Kernel.of(_code(".L_x_0:", "FADD R1, R1, R1", "@P0 BRA `(.L_x_0)", "EXIT"), warps=4)
    assert plain.trips(Counts(iterations=5)) == 5
    assert bounds(_launch((1,)), plain, Counts(iterations=5), _CARD)["issue"] == pytest.approx((3 + 4 * 2) / 1e9)
    straight = Kernel.of(_code("FADD R1, R1, R1", "EXIT"), warps=4)
    assert bounds(_launch((1,)), straight, Counts(iterations=5), _CARD)["issue"] == pytest.approx(2 / 1e9)


def test_what_torch_computes() -> None:
    convolution = Launch("convolution", "convolution", {}, {}, (), 10**6, 7e11)
    assert library_seconds(convolution, _CARD) == pytest.approx(1.0)
    assert library_seconds(Launch("cat", "cat", {}, {}, (), 2 * 10**12, 0.0), _CARD) == pytest.approx(2.0)


@torch.no_grad()
def test_programs_are_counted_as_they_run() -> None:
    """Few programs have 64 queries; 40 channels are padded to 48, the last keys to 64, and padding is not loaded."""
    recorder = Recorder()
    with recorder.recording():
        q, k, v = (torch.empty(2, n, 80, dtype=torch.float16, device="meta") for n in (200, 77, 77))
        KERNELS.attention(q, k, v, 2)
        x = torch.empty(2, 64, 10, 10, dtype=torch.float16, device="meta").to(memory_format=torch.channels_last)
        KERNELS.residual_add(x, x.clone(), torch.empty(64, dtype=torch.float16, device="meta"))
    launches = [one for one in recorder.launches if one.is_ours]
    attention, add = count_programs(launches)
    assert (attention.flops, attention.iterations) == (2 * 2 * 64 * 128 * 48, 1)
    assert attention.loaded_bytes == 2 * (64 * 40 + 2 * 77 * 40)
    assert attention.stored_bytes == 2 * 64 * 40
    assert (add.flops, add.loaded_bytes, add.stored_bytes, add.iterations) == (0, 3 * 2 * 1024, 2 * 1024, 0)


@pytest.mark.skipif(not list(RESULTS.glob("sass-*.json")), reason="python -m benchmarks.sass was not run")
def test_committed_tables_hold_together() -> None:
    for sass in [json.loads(file.read_text())["sass"] for file in sorted(RESULTS.glob("sass-*.json"))]:
        for step in sass["steps"].values():
            assert step["predicted_ms"] == pytest.approx(sum(step["ms"].values()) + step["gaps_ms"], abs=2e-3)
        ours = sum(row["step_us"] for row in sass["kernels"]) / 1e3
        ms = sass["steps"]["guided_step"]["ms"]
        own = sum(ms[kind] for kind in ("GroupNorm", "LayerNorm", "attention"))
        assert own < ours < sum(ms.values())
        for row in sass["kernels"]:
            assert set(row["usage"]) == {"80", "86", "89", "90"}
            assert math.isclose(row["trips"], round(row["trips"]), abs_tol=0.02), row


def test_the_newest_triton_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.tables()["sass"] == "`python -m benchmarks.sass` was not run.\n"
    counts, ms_by_kind = {"products": 3, "copies": 2}, {"products": 2.5, "copies": 0.25}
    taken = {"registers": 130, "stack_bytes": 0, "shared_bytes": 2048}
    row = {
        "kernel": "_attention_fwd_kernel",
        "constants": "D=40 num_warps=4",
        "launches": 7,
        "usage": {"80": taken | {"stack_bytes": 8}, "86": taken, "89": taken, "90": taken | {"registers": 90}},
        "loop": {"loop_instructions": 100, "hgmma": 22, "hmma": 0, "mufu": 68},
        "trips": 64.0,
        "tile_flops": 1e8,
        "tile_bytes": 10240,
        "bounds_us": {"tensor": 1.0, "exp": 5.0, "issue": 2.0},
        "step_us": 35.04,
    }
    for version, ms in (("3.9.1", 4.0), ("3.10.0", 3.0)):
        step = {"kernels": counts, "ms": ms_by_kind, "gaps_ms": 0.5, "predicted_ms": ms}
        content = {"triton": version, "dtype": "fp16", "card": asdict(CardRates()), "steps": {"guided_step": step}}
        content = {"machine": {}, "sass": content | {"dci_average_ms": 5.0, "kernels": [row]}}
        (tmp_path / f"sass-{version}.json").write_text(json.dumps(content))
    tables = report.tables()
    assert "Its kernels as Triton 3.10.0 compiles them for sm_90 ([sass-3.10.0.json]" in tables["sass"]
    assert "| kernels | 3 | 2 | | 5 |" in tables["sass"]
    assert "| ms, Triton 3.9.1 | 2.50 | 0.25 | 0.50 | 4.00 |" in tables["sass"]
    cells = "7 | 90 (130, 130, 130) | 2 (2, 2, 2) | 8 | 100, 22, 0, 68 | 64 | 100.0 | 10 | exp | 35.0"
    assert f"| attention D=40 | {cells} |" in tables["sass"]
    assert "| dci_average | 2.34 | 6.1 | 4.15 | 5.00 | not measured | not measured |" in tables["gpu"]
    assert "| guided_step | 2.03 | 5.3 | 3.7 | 3.00 | not measured | not measured |" in tables["gpu"]
    assert gpu_tables.predictions({}) == {}
