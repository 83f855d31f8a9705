"""What tells one call from another, and which calls a model makes."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine.backends.calibration.calls import ROW_ARGUMENTS, Call, key_of, words_of
from engine.backends.calibration.contenders import contenders
from engine.backends.calibration.proof import choose
from engine.backends.calibration.serve import Served
from engine.backends.calibration.table import Choice, Table
from engine.backends.ops import TORCH
from engine.models.calls import calls_of
from engine.models.config import UNetConfig, VAEConfig
from tests.pipelines import SD_V1_5_UNET, random_concept


def _attention(B: int, N: int, S: int, C: int, dtype: torch.dtype = torch.float16, device: str = "meta") -> list[Any]:
    return [*(torch.empty(B, n, C, dtype=dtype, device=device) for n in (N, S, S)), 8]


def test_dtypes_sizes_and_strides_are_told_apart_and_rows_are_not() -> None:
    """An entry for self-attention in half precision is none for a text's 77 keys, nor for float32."""
    own = key_of("attention", tuple(_attention(2, 64, 64, 320)))
    assert own == key_of("attention", tuple(_attention(8, 64, 64, 320)))
    for other in (
        _attention(2, 64, 77, 320),
        _attention(2, 32, 32, 320),
        _attention(2, 64, 64, 640),
        _attention(2, 64, 64, 320, torch.float32),
        [*_attention(2, 64, 64, 320)[:3], 4],
        [*torch.empty(2, 64, 960, dtype=torch.float16, device="meta").chunk(3, dim=-1), 8],
    ):
        assert key_of("attention", tuple(other)) != own
    assert words_of(own) == "attention float16 64x320 64x320 64x320"


def test_how_many_tokens_a_concept_has_is_not_told() -> None:
    def call(tokens: int) -> tuple[Any, ...]:
        q, k, v, n_heads = _attention(2, 64, 77, 320)
        return q, k, v, torch.empty(2, tokens, dtype=torch.int64, device="meta"), n_heads

    assert key_of("cross_attention", call(1)) == key_of("cross_attention", call(3))


def test_a_call_is_the_same_after_a_journey() -> None:
    call = Call("attention", (*torch.empty(2, 64, 960, dtype=torch.float16, device="meta").chunk(3, dim=-1), 8))
    again = Call.from_json(json.loads(json.dumps(call.to_json())))
    assert (again.key, again.rows) == (call.key, 2)
    assert again.arguments[0].stride() == (61440, 960, 1)


def test_other_launches_of_ours_are_contenders_where_they_may_be_faster() -> None:
    def ours(op: str, *arguments: Any) -> set[str]:
        return {name for name in contenders(Call(op, arguments)) if name.startswith("triton")}

    def norm(channels: int, side: int) -> set[str]:
        x = torch.empty(2, channels, side, side, device="meta").to(memory_format=torch.channels_last)
        return ours("group_norm", x, *torch.empty(2, channels, device="meta"), 32, 1e-5)

    assert [norm(1280, 8), norm(320, 128)] == [{"triton"}, {"triton"}]
    assert norm(640, 32) == {"triton", "triton, two launches"}
    assert norm(320, 64) == {"triton", "triton, one launch"}
    split = {"triton", "triton, keys split"}
    assert [ours("attention", *_attention(2, N, N, C)) for N, C in ((256, 1280), (64, 1280))] == [split, split]
    assert ours("attention", *_attention(2, 4096, 4096, 320)) == {"triton"}
    assert ours("attention", *_attention(2, 16, 16, 320)) == {"triton"}  # one block of keys
    assert ours("attention", *_attention(1, 64, 64, 8 * 512)) == set()


def _served(choices: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> Served:
    arguments = tuple(_attention(2, 4, 4, 16, torch.float32))
    table = Table({}, Path("nowhere"), {key_of("attention", arguments): {n: Choice(s, "") for n, s in choices.items()}})
    functions = {name: lambda *_, name=name: name for name in ("torch", "triton", "flash")}
    monkeypatch.setattr("engine.backends.calibration.serve.implementation", lambda op, name: functions[name])
    return Served("attention", table)


def test_a_choice_serves_more_rows_up_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    served = _served({8: "torch", 2: "triton"}, monkeypatch)
    found = {rows: served(*_attention(rows, 4, 4, 16, torch.float32)) for rows in (1, 2, 7, 8, 20)}
    assert found == {1: "triton", 2: "triton", 7: "triton", 8: "torch", 20: "torch"}
    assert str(served) == "triton at 1 of 2 calls, torch at 1 of 2 calls; torch elsewhere"


def test_gradients_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    served = _served({2: "triton"}, monkeypatch)
    q, k, v, n_heads = _attention(2, 4, 4, 16, torch.float32, "cpu")
    assert served(q, k, v, n_heads) == "triton"
    assert served(q, k.requires_grad_(True), v, n_heads).requires_grad
    with torch.no_grad():
        assert served(q, k, v, n_heads) == "triton"


def test_what_was_not_tried_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    served = _served({2: "triton"}, monkeypatch)
    arguments = [
        x.normal_() if isinstance(x, torch.Tensor) else x for x in _attention(2, 4, 5, 16, torch.float32, "cpu")
    ]
    torch.testing.assert_close(served(*arguments), TORCH.attention(*arguments))
    assert str(_served({}, monkeypatch)) == "torch, not calibrated"
    assert str(_served({2: "torch"}, monkeypatch)).startswith("torch, which nothing beats at 1 calls")


def test_margins() -> None:
    def chosen(**medians: float) -> str:
        return choose({name: [1e-6 * value] * 9 for name, value in medians.items()}, {})[0]

    assert chosen(torch=100.0, triton=96.0) == "triton"
    assert chosen(torch=100.0, triton=98.0) == "torch"
    assert chosen(torch=100.0, flash=80.0, triton=78.0) == "flash"
    assert chosen(torch=100.0, flash=80.0, triton=77.0) == "triton"
    both = {"torch": 100.0, "triton": 90.0, "triton, two launches": 80.0}
    assert chosen(**both) == "triton, two launches"
    assert chosen(**both, flash=82.0) == "flash"
    why = choose({name: [1e-6 * value] * 9 for name, value in (both | {"torch": 79.0}).items()}, {})[1]
    assert why == "79.0 us; ours takes 80.0 us"
    assert chosen(torch=100.0, unfused=80.0, triton=90.0, **{"triton, pointers": 79.0}) == "unfused"
    assert chosen(torch=100.0, unfused=80.0, triton=60.0, **{"triton, pointers": 50.0}) == "triton, pointers"
    noisy = [50.0] * 7 + [120.0] * 2
    assert choose({"torch": [100.0] * 9, "triton": noisy}, {})[0] == "torch"


def test_the_calls_are_those_that_a_model_makes(small_folder: Any) -> None:
    """A plain picture, an Infusion and a DCI one, and their decoding, in their real order of memory."""
    sd = engine.load(small_folder, backend="torch")
    expected = {(call.key, call.rows) for call in calls_of(sd.unet.config, sd.vae.config, torch.float32, 77)}
    made = set()

    def watched(op: str) -> Any:
        def call(*arguments: Any) -> Any:
            made.add((key_of(op, arguments), len(arguments[0])))
            return getattr(TORCH, op)(*arguments)

        return call

    ops = replace(TORCH, **{one.name: watched(one.name) for one in fields(TORCH) if one.name in ROW_ARGUMENTS})
    for module in [*sd.unet.modules(), *sd.vae.modules()]:
        if hasattr(module, "ops"):
            module.ops = ops
    sd.unet.compose()
    options = {"steps": 1, "seed": 0, "output": "pil", "progress": False}
    for custom in (None, engine.Infusion([random_concept(sd)]), engine.DCI("cat", "dog", fraction=1.0)):
        sd.generate("a cat", customization=custom, **options)
    assert made <= expected
    sd.generate("a cat", images_per_prompt=4, **(options | {"output": "latent"}))
    assert made <= expected
    assert {key for key, _ in expected} == {key for key, _ in made}


def test_sd_v1_5s_calls() -> None:
    widths = [128, 256, 512, 512]
    decoder = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": widths,
        "layers_per_block": 2,
        "norm_num_groups": 32,
    }
    decoder |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    calls = calls_of(UNetConfig.from_dict(SD_V1_5_UNET), VAEConfig.from_dict(decoder), torch.float16, 77)
    found = {(words_of(call.key), call.rows): call.times for call in calls}
    assert found["attention float16 4096x320 4096x320 4096x320", 2] == 6
    assert found["attention float16 4096x320 77x320 77x320", 8] == 5
    assert found["linear_add float16 64x5120 1280x5120 1280 64x1280 64x1280 1280x1280", 8] == 1
    assert found["group_norm_silu float16 1280x16x16 1280 1280 1280", 2] > 1
    assert {call.op for call in calls} == set(ROW_ARGUMENTS)
    assert 80 < len(calls) < 400
