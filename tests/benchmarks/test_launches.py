"""How many kernels a guided step launches on ``backend="triton"``, of which kinds: as recorded, and as launched."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from benchmarks.launches import (
    SD_V1_5,
    SD_V1_5_VAE,
    Launch,
    count_kinds,
    decode_launches,
    kind_of,
    step_launches,
)
from benchmarks.machine import RESULTS
from benchmarks.systems import _plan, run_step, start_latents
from engine.models.config import UNetConfig
from tests.fake_cuda import Card, FakeCuda
from tests.pipelines import SD_V1_5_UNET, SHAPES, random_concept, save_pipeline

_STEP = 421  # fewer is better; a change is one of docs/performance.md, by python -m benchmarks.sass
_KERNELS_OF_OPS = {"attention": 1, "residual_add": 1}


def _counts(launches: list[Launch]) -> dict[str, int]:
    return count_kinds(one.kernel for one in launches)


def test_a_guided_step_of_sd_v1_5() -> None:
    launches = step_launches(SD_V1_5, torch.float16)
    counts = _counts(launches)
    assert counts == {
        "GroupNorm": 77,
        "LayerNorm": 48,
        "products": 140,
        "attention": 32,
        "convolutions": 52,
        "adds": 32,
        "copies": 29,
        "others": 11,
    }
    assert len(launches) == sum(counts.values()) == _STEP
    assert sum(one.is_ours for one in launches) == 289


@pytest.mark.skipif(not list(RESULTS.glob("sass-*.json")), reason="python -m benchmarks.sass was not run")
def test_the_committed_table_has_these_counts() -> None:
    for file in sorted(RESULTS.glob("sass-*.json")):
        steps = json.loads(file.read_text())["sass"]["steps"]
        for name, case in (("guided_step", "plain"), ("infusion_parallel_1", "infusion"), ("dci_mixing_step", "dci")):
            assert steps[name]["kernels"] == _counts(step_launches(SD_V1_5, torch.float16, case)), "run benchmarks.sass"
        decoding = decode_launches(SD_V1_5_VAE, torch.float16, (64, 64))
        assert steps["vae_decode"]["kernels"] == _counts(decoding)


def test_the_config_is_sd_v1_5s() -> None:
    assert UNetConfig.from_dict(SD_V1_5_UNET) == SD_V1_5


@pytest.mark.parametrize("case", ["plain", "infusion", "dci"])
def test_what_counts_depend_on(case: str) -> None:
    """The structure alone, but for GroupNorms, which take two kernels in large pictures, and split products."""
    counts = _counts(step_launches(SD_V1_5, torch.float16, case))
    narrow = replace(SD_V1_5, block_out_channels=(32, 64, 128, 128), cross_attention_dim=32, sample_size=16)
    small = _counts(step_launches(narrow, torch.bfloat16, case, n=4, size=(16, 24), text_length=154))
    alike = [kind for kind in counts if kind not in ("GroupNorm", "products")]
    assert {kind: small[kind] for kind in alike} == {kind: counts[kind] for kind in alike}
    assert small["GroupNorm"] == 61  # how many there are
    assert counts["GroupNorm"] == 61 + 16
    deeper = replace(narrow, layers_per_block=3)
    assert sum(_counts(step_launches(deeper, torch.bfloat16, case)).values()) > sum(small.values())


def test_older_cards_take_the_same_kernels_but_no_descriptors() -> None:
    for architecture in (80, 86, 89, 90):
        launches = step_launches(SD_V1_5, torch.float16, architecture=architecture)
        products = [one for one in launches if one.kernel == "_product_kernel"]
        assert len(products) == 6 * 16  # q k v, out, q, out, GEGLU and the last of each transformer block
        assert {one.options["TMA"] for one in products} == {architecture == 90}


def test_work_is_counted_once() -> None:
    """1,606 GFLOP a step, less what is computed once for both rows, and the texts, which are projected ahead."""
    launches = step_launches(SD_V1_5, torch.float16)
    flops = sum(one.flops for one in launches)
    assert 0.95 * 1606e9 < flops < 1606e9
    weights = 1.719e9 - 2 * 2 * sum(768 * C * n for C, n in ((320, 5), (640, 5), (1280, 6)))
    assert sum(one.n_bytes for one in launches) > weights
    twice = step_launches(SD_V1_5, torch.float16, n=2)
    assert sum(one.flops for one in twice) == pytest.approx(2 * flops)


def test_launches_say_what_triton_is_given() -> None:
    launches = step_launches(SD_V1_5, torch.float16)
    first = next(one for one in launches if one.kernel == "_attention_fwd_kernel")
    assert (first.op, first.grid, first.n_programs) == ("attention", (32, 8, 1), 256)
    assert {name: first.arguments[name] for name in ("N", "S", "stride_q")} == {"N": 4096, "S": 4096, "stride_q": 960}
    assert first.arguments["q_ptr"].dtype == torch.float16
    assert first.options["D"] == 40
    assert "D" not in first.arguments
    assert first.flops == 4 * 4096**2 * 320
    assert not any(one.flops for one in launches if kind_of(one.kernel) in ("LayerNorm", "GroupNorm", "adds", "copies"))
    sums = [one for one in launches if one.kernel == "_product_sum_kernel"]
    assert sums
    assert not any(one.flops for one in sums)
    working = [one for one in launches if one.kernel != "_product_sum_kernel"]
    assert all(one.flops for one in working if kind_of(one.kernel) in ("products", "attention", "convolutions"))
    for op, n in _KERNELS_OF_OPS.items():
        of_op = [one for one in launches if one.op == op and one.is_ours]
        assert of_op
        assert len(of_op) % n == 0


@pytest.fixture(scope="module")
def sd_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd_like")
    save_pipeline("sd_like", folder)
    return folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("case", ["plain", "infusion", "dci"])
def test_what_a_card_is_given_is_what_is_recorded(sd_like: Path, case: str) -> None:
    """Of SD v1.5's structure, with narrow widths, through the Engine's own step."""
    config, size = UNetConfig.from_dict(_config_of(sd_like)), (16, 16)  # 2 x 2 where it is smallest
    recorded = step_launches(config, torch.float32, case, size=size)
    with FakeCuda() as card:
        names = _launched(card, sd_like, case)
    ours = Counter(one.kernel for one in recorded if one.is_ours)
    assert Counter(name for name in names if name.endswith("_kernel")) == ours
    assert count_kinds(names) == _counts(recorded)


def _launched(card: Card, folder: Path, case: str) -> list[str]:
    """What one step gives the card."""
    sd = engine.load(folder, device="cuda:0", dtype="float32", backend="triton")
    custom: Any = None
    if case != "plain":
        custom = engine.Infusion([random_concept(sd)]) if case == "infusion" else engine.DCI("cat", "dog", fraction=1.0)
    phase, state, _ = _plan(sd, [custom], start_latents(16, "cuda:0"))
    sd.graphs = None
    card.launches.clear()
    card.operations.clear()
    run_step(sd, phase, state)
    names = [launch.kernel for launch in card.launches]
    for name, dtypes in card.operations:
        names.append(name.removeprefix("aten."))
        if "convolution" in name and len(dtypes) == 3:
            names.append("bias of a convolution")
    return names


def _config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "unet" / "config.json").read_text())


def test_sd_like_has_sd_v1_5s_structure() -> None:
    sizes = SHAPES["sd_like"]["unet"]
    assert all(list(sizes[name]) == value for name, value in SD_V1_5_UNET.items() if "block_types" in name)
    assert sizes["layers_per_block"] == SD_V1_5_UNET["layers_per_block"]
