"""LoRA files that are damaged, foreign or hostile are refused, and every key is accounted for."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import engine
from tests.loras import write_kohya

_LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
_TO_K = _LAYER.replace("attn1_to_q", "attn2_to_k")
_WIDTH = 48  # of the small model's middle


@pytest.fixture
def file(small: engine.Engine, tmp_path: Path) -> Path:
    chosen = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q."
    return write_kohya(small, tmp_path / "x.safetensors", lambda name: chosen in name, None)


def _refuses(small: engine.Engine, path: Path, message: str) -> None:
    with pytest.raises(engine.CheckpointError, match=message) as error:
        small.with_loras([engine.LoRA(path)])
    assert str(path.parent) in str(error.value)


def _edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def _down(width: int) -> torch.Tensor:
    return torch.ones(4, width)


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "SDXL, which has two text encoders"),
        ("text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight", "SDXL"),
        ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "FLUX"),
        ("transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight", "FLUX"),
        ("transformer.transformer_blocks.0.attn.to_k.lora_A.weight", "Stable Diffusion 3"),
        ("lora_unet_joint_blocks_0_context_block_attn_proj.lora_down.weight", "Stable Diffusion 3"),
        ("model.diffusion_model.joint_blocks.0.x", "Stable Diffusion 3"),
        ("first_stage_model.decoder.conv_in.weight", "a whole checkpoint, which engine.load reads"),
        ("emb_params", "an embedding, which engine.import_textual_inversion reads"),
        ("control_model.input_blocks.0.0.weight", "a ControlNet"),
        (f"{_LAYER}.oft_blocks", "OFT or BOFT"),
        (f"{_LAYER}.a1.weight", "GLoRA"),
    ],
)
def test_other_files_are_told(small: engine.Engine, file: Path, key: str, what: str) -> None:
    """Even one key of another kind: nothing is left unread."""
    _edit(file, lambda tensors: tensors.update({key: torch.zeros(2, 2)}))
    _refuses(small, file, rf"not a LoRA for Stable Diffusion 1: it looks like {what}.*{re.escape(key)}")


@pytest.mark.parametrize(("width", "what"), [(1024, "Stable Diffusion 2"), (2048, "SDXL"), (99, "another model")])
def test_models_of_the_same_names_are_told_by_their_text(
    small: engine.Engine, file: Path, width: int, what: str
) -> None:
    layer = {f"{_TO_K}.lora_down.weight": _down(width), f"{_TO_K}.lora_up.weight": torch.ones(_WIDTH, 4)}
    _edit(file, lambda tensors: tensors.update(layer))
    _refuses(small, file, f"it is for {what}: .*attn2_to_k.* reads text of width {width}, and this model's is 32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"lora_unet_nothing.lora_up.weight": torch.zeros(2, 2)}),
            "belong to no layer .*unet_nothing",
        ),
        (lambda t: t.update({f"{_LAYER}.lora_up.bias": torch.zeros(2)}), r"no part of a LoRA: .*lora_up\.bias"),
        (lambda t: t.update({f"unknown{i}": torch.zeros(1) for i in range(3)}), "unknown0, unknown1, unknown2$"),
        (
            lambda t: t.update({f"unknown{i}": torch.zeros(1) for i in range(4)}),
            "unknown0, unknown1, unknown2 and 1 more$",
        ),
        (
            lambda t: t.update({f"unknown{i}": torch.zeros(1) for i in range(5)}),
            "unknown0, unknown1, unknown2 and 2 more",
        ),
        (lambda t: t.clear(), "not a LoRA: it holds no tensors"),
        (lambda t: t.pop(f"{_LAYER}.lora_up.weight"), "the parts of a layer are incomplete or mixed: .*lora_down"),
        (lambda t: t.update({f"{_LAYER}.hada_w1_a": torch.zeros(2, 2)}), "incomplete or mixed"),
        (
            lambda t: t.update({f"{_LAYER}.lora_down.weight": _down(7)}),
            r"to_q.weight: must make a change of \(48, 48\), found .*lora_down.weight \(4, 7\)",
        ),
        (lambda t: t.update({f"{_LAYER}.lora_up.weight": torch.ones(96, 4)}), r"must make a change of \(48, 48\)"),
        (lambda t: t.update({f"{_LAYER}.lora_up.weight": torch.ones(48, 5)}), r"found .*lora_up.weight \(48, 5\)"),
        (lambda t: t.update({f"{_LAYER}.dora_scale": torch.ones(48)}), r"dora_scale \(48,\)"),
        (
            lambda t: t.update({f"{_LAYER}.alpha": torch.tensor(float("nan"))}),
            "alpha must be one number >= 0, found nan",
        ),
        (lambda t: t.update({f"{_LAYER}.alpha": torch.tensor(-1.0)}), "alpha must be one number >= 0, found -1.0"),
        (lambda t: t.update({f"{_LAYER}.alpha": torch.ones(2)}), "alpha must be one number >= 0, found"),
        (
            lambda t: t[f"{_LAYER}.lora_up.weight"].view(-1)[5:6].fill_(torch.nan),
            "lora_up.weight: expected finite values",
        ),
        (
            lambda t: t.update({f"unet.{_DOTTED}.lora_A.weight": _down(48)}),
            r"lora_A.weight and .*lora_down.weight both are the down of mid_block",
        ),
    ],
)
def test_bad_layers_are_named(small: engine.Engine, file: Path, change, message: str) -> None:
    _edit(file, change)
    _refuses(small, file, message)


_DOTTED = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def test_what_is_left_out_is_checked_too(small: engine.Engine, file: Path) -> None:
    _edit(file, lambda tensors: tensors.update({f"{_LAYER}.lora_down.weight": _down(7)}))
    with pytest.raises(engine.CheckpointError, match="must make a change"):
        small.with_loras([engine.LoRA(file, 0.0)])


def test_shapes_are_checked_before_anything_is_computed(small: engine.Engine, file: Path) -> None:
    """A Kronecker product of two small files would fill the memory."""
    big = torch.zeros(4000, 1000)
    save_file({f"{_LAYER}.lokr_w1": big, f"{_LAYER}.lokr_w2": big.clone()}, file)
    _refuses(small, file, r"must make a change of \(48, 48\), found .*lokr_w1 \(4000, 1000\)")


def test_any_shapes_load_or_are_named(small: engine.Engine, file: Path) -> None:
    """Whatever shapes the parts have, the error is ours."""
    generator, refused = random.Random(0), 0
    forms = (
        ("lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha"),
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "dora_scale"),
        ("diff", "lora_magnitude_vector"),
    )
    for parts in forms * 40:
        shapes = [[generator.choice((0, 1, 2, 48)) for _ in range(generator.randrange(4))] for _ in parts]
        save_file({f"{_LAYER}.{part}": torch.zeros(shape) for part, shape in zip(parts, shapes, strict=True)}, file)
        try:
            small.with_loras([engine.LoRA(file)])
        except engine.CheckpointError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("alpha", [0.0, None])
def test_without_alpha_the_rank_is_taken(small: engine.Engine, file: Path, alpha: float | None) -> None:
    changes = []
    for value in (4.0, alpha):
        _edit(file, lambda t, value=value: t.pop(f"{_LAYER}.alpha", None))
        if value is not None:
            _edit(file, lambda t, value=value: t.update({f"{_LAYER}.alpha": torch.tensor(value)}))
        changes.append(small.with_loras([engine.LoRA(file)]).unet.state_dict()[f"{_DOTTED}.weight"])
    assert torch.equal(*changes)
    assert not torch.equal(changes[0], small.unet.state_dict()[f"{_DOTTED}.weight"])


def test_values_that_overflow_the_models_dtype(small_folder: Path, file: Path) -> None:
    _edit(file, lambda t: t[f"{_LAYER}.lora_up.weight"].mul_(1e6))
    with pytest.warns(RuntimeWarning):
        sd = engine.load(small_folder, dtype="float16")
    _refuses(sd, file, "values overflow torch.float16")


def test_damaged_files(small: engine.Engine, file: Path) -> None:
    whole = file.read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        file.write_bytes(whole[:size])
        _refuses(small, file, r"truncated|not a whole")
    file.with_suffix(".pt").write_bytes(b"\x80\x02}q\x00.")
    _refuses(small, file.with_suffix(".pt"), "pickle files can run code")


def _peft(folder: Path, config: object) -> Path:
    tensors = {
        f"base_model.model.{_DOTTED}.lora_A.weight": _down(48),
        f"base_model.model.{_DOTTED}.lora_B.weight": _down(48).T,
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "adapter_config.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "peft keeps alpha in adapter_config.json, which must lie beside it"),
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object, found list"),
        ({"peft_type": "ADALORA"}, "peft_type must be one of LORA, LOHA, LOKR, found 'ADALORA'"),
        ({"r": 4, "lora_alpha": 8, "fan_in_fan_out": True}, "fan_in_fan_out must be off, found True"),
        ({"r": 4, "lora_alpha": 0}, "alpha must be a positive number, found 0"),
        ({"r": 4, "lora_alpha": "8"}, "alpha must be a positive number, found '8'"),
        ({"r": 4}, "alpha must be a positive number, found None"),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": [1]}, "alpha_pattern must be a JSON object"),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"(a+)+$": 1}}, "alpha_pattern must hold names of modules, found"),
    ],
)
def test_pefts_configuration(small: engine.Engine, tmp_path: Path, config, message: str) -> None:
    with pytest.raises(engine.CheckpointError, match=message):
        small.with_loras([engine.LoRA(_peft(tmp_path, config))])


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 99, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 2, "to_q": 12}}, 0.5),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"^attn1\\.to_q": 2, f"^{_DOTTED}$": 6}}, 1.5),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"n1.to_q": 2}}, 2.0),
    ],
)
def test_pefts_scale(small: engine.Engine, tmp_path: Path, config: dict, scale: float) -> None:
    actual = small.with_loras([engine.LoRA(_peft(tmp_path, config))])
    name = f"{_DOTTED}.weight"
    change = actual.unet.state_dict()[name] - small.unet.state_dict()[name]
    torch.testing.assert_close(change, torch.full((48, 48), 4 * scale), rtol=1e-5, atol=1e-5)
