"""ControlNets' files: diffusers' folders and files, the original layout, and what is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import engine
from engine.models.config import UNetConfig
from engine.models.controlnet import ControlNetConfig, ControlNetModel
from engine.weights import ldm
from tests.controlnets import HINT_CHANNELS, make_controlnet
from tests.pipelines import SD_V1_5_UNET

_FILE = "diffusion_pytorch_model.safetensors"
_NAMES = {
    "conv_in.weight": "input_blocks.0.0.weight",
    "time_embedding.linear_2.bias": "time_embed.2.bias",
    "controlnet_cond_embedding.conv_in.weight": "input_hint_block.0.weight",
    "controlnet_cond_embedding.blocks.0.bias": "input_hint_block.2.bias",
    "controlnet_cond_embedding.blocks.5.weight": "input_hint_block.12.weight",
    "controlnet_cond_embedding.conv_out.weight": "input_hint_block.14.weight",
    "controlnet_down_blocks.0.weight": "zero_convs.0.0.weight",
    "controlnet_down_blocks.11.bias": "zero_convs.11.0.bias",
    "controlnet_mid_block.weight": "middle_block_out.0.weight",
    "down_blocks.0.attentions.1.norm.bias": "input_blocks.2.1.norm.bias",
    "down_blocks.2.downsamplers.0.conv.bias": "input_blocks.9.0.op.bias",
    "down_blocks.3.resnets.1.time_emb_proj.weight": "input_blocks.11.0.emb_layers.1.weight",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": (
        "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    ),
    "mid_block.resnets.1.norm2.weight": "middle_block.2.out_layers.0.weight",
}
SD_V1_5_CONTROLNET = {
    "_class_name": "ControlNetModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "class_embed_type": None,
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
    "controlnet_conditioning_channel_order": "rgb",
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_time_scale_shift": "default",
    "upcast_attention": False,
    "use_linear_projection": False,
}  # as control_v11p_sd15_canny's has it, which knows no mid_block_type yet


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("nets") / "canny"
    unet = diffusers.UNet2DConditionModel.from_pretrained(small_folder / "unet")
    make_controlnet(unet, HINT_CHANNELS["narrow"]).save_pretrained(folder)
    return folder


def _original(sd: engine.Engine, folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for key, value in load_file(folder / _FILE).items():
        name = ldm.controlnet_name(sd.unet.config, 2, key)
        tensors[prefix + name.removeprefix(ldm.CONTROL_PREFIX)] = value
    assert len(tensors) == len(load_file(folder / _FILE))
    return tensors


def _same(net: ControlNetModel, folder: Path) -> bool:
    state, expected = net.state_dict(), load_file(folder / _FILE)
    assert state.keys() == expected.keys()
    return all(torch.equal(state[name], weight) for name, weight in expected.items())


def test_names_by_hand() -> None:
    """Those of SD v1.5's 340 tensors."""
    unet = UNetConfig.from_dict(SD_V1_5_UNET)
    for ours, theirs in _NAMES.items():
        assert ldm.controlnet_name(unet, 6, ours) == f"control_model.{theirs}"
    config = ControlNetConfig.from_dict(SD_V1_5_CONTROLNET)
    with torch.device("meta"):
        net = ControlNetModel(config)
    names = {ldm.controlnet_name(config.unet, 6, key) for key in net.state_dict()}
    assert len(names) == len(net.state_dict()) == 340
    assert sum(weight.numel() for weight in net.state_dict().values()) == 361_279_120  # as the model's page has it
    assert not [name for name in names if "down_blocks" in name or "controlnet" in name]


def test_folders(small: engine.Engine, folder: Path) -> None:
    net = engine.load_controlnet(folder, small)
    assert _same(net, folder)
    assert net.name == "canny"
    assert net.control.hint_channels == HINT_CHANNELS["narrow"]
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_half_precision(small_folder: Path, folder: Path) -> None:
    sd = engine.load(small_folder, dtype="bfloat16")
    net = engine.load_controlnet(folder, sd)
    assert {parameter.dtype for parameter in net.parameters()} == {torch.bfloat16}
    assert sd.generate("a cat", control=engine.Control(net, _grey()), steps=1, progress=False).images


def _grey():
    from PIL import Image

    return Image.new("L", (16, 16), 90)


@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_the_original_layout(small: engine.Engine, folder: Path, tmp_path: Path, prefix: str) -> None:
    tensors = _original(small, folder, prefix)
    if prefix:  # a whole checkpoint, as the first ControlNets were
        tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(1)
    save_file(tensors, tmp_path / "canny-fp16.safetensors")
    net = engine.load_controlnet(tmp_path / "canny-fp16.safetensors", small)
    assert _same(net, folder)
    assert net.name == "canny-fp16"
    expected = engine.load_controlnet(folder, small).control
    assert net.control.hint_channels == expected.hint_channels
    assert replace(net.config, sample_size=0) == replace(expected.unet, sample_size=0)  # which it has no use for


def test_files_in_diffusers_layout(small: engine.Engine, folder: Path, tmp_path: Path) -> None:
    """Alone, beside its config, and with the config of another folder, which tells what weights do not."""
    save_file(load_file(folder / _FILE), tmp_path / "canny.safetensors")
    assert _same(engine.load_controlnet(tmp_path / "canny.safetensors", small), folder)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"controlnet_conditioning_channel_order": "bgr"}))
    assert engine.load_controlnet(tmp_path / "canny.safetensors", small).control.is_bgr
    (tmp_path / "shuffle").mkdir()
    (tmp_path / "shuffle" / "config.json").write_text(json.dumps(config | {"global_pool_conditions": True}))
    net = engine.load_controlnet(tmp_path / "canny.safetensors", small, config=tmp_path / "shuffle")
    assert net.control.is_pooled
    assert not net.control.is_bgr
    save_file(_original(small, folder, ""), tmp_path / "original.safetensors")
    assert engine.load_controlnet(tmp_path / "original.safetensors", small).control.is_bgr  # the folder's config


def _refused(message: str, path: Path, sd: engine.Engine, **options) -> None:
    with pytest.raises(engine.CheckpointError, match=re.escape(message)):
        engine.load_controlnet(path, sd, **options)


def test_nets_of_other_models_are_refused(small: engine.Engine, folder: Path, tmp_path: Path) -> None:
    for name, changes, message in (
        (
            "text",
            {"cross_attention_dim": 1024},
            "cross_attention_dim must be 32 to fit the model, got 1024 (a net of SD 2?)",
        ),
        (
            "width",
            {"block_out_channels": (12, 48)},
            "block_out_channels must be (24, 48) to fit the model, got (12, 48)",
        ),
        ("depth", {"layers_per_block": 2}, "layers_per_block must be 1 to fit the model, got 2"),
        ("latents", {"in_channels": 9}, "in_channels must be 4 to fit the model, got 9"),
        ("hint", {"conditioning_embedding_out_channels": (8, 8, 8)}, "must make them 2 times smaller, as this model's"),
    ):
        config = json.loads((folder / "config.json").read_text()) | changes
        net = diffusers.ControlNetModel.from_config(config)
        net.save_pretrained(tmp_path / name)
        _refused(message, tmp_path / name, small)
        if name in ("text", "hint"):  # from a file's shapes
            save_file(load_file(tmp_path / name / _FILE), tmp_path / f"{name}.safetensors")
            _refused(message, tmp_path / f"{name}.safetensors", small)
            n_hint_blocks = 2 * (len(config["conditioning_embedding_out_channels"]) - 1)
            tensors = {
                ldm.controlnet_name(small.unet.config, n_hint_blocks, key): value
                for key, value in load_file(tmp_path / name / _FILE).items()
            }
            save_file(tensors, tmp_path / f"{name}-original.safetensors")
            _refused(message, tmp_path / f"{name}-original.safetensors", small)


def test_other_files_are_refused_by_name(
    small: engine.Engine, folder: Path, small_folder: Path, tmp_path: Path
) -> None:
    tensors = load_file(folder / _FILE)
    for key, kind in (
        ("lora_controlnet", "it is a Control-LoRA of SDXL, which is not read"),
        ("difference", "it is a difference of two models' weights"),
        ("add_embedding.linear_1.weight", "it is a ControlNet of SDXL"),
        ("adapter.body.0.weight", "it is a T2I-Adapter"),
    ):
        save_file({**tensors, key: torch.zeros(1)}, tmp_path / "x.safetensors")
        _refused(kind, tmp_path / "x.safetensors", small)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    _refused(
        "not a ControlNet in diffusers' or the original layout: no controlnet_cond", tmp_path / "x.safetensors", small
    )
    save_file({**tensors, "extra": torch.zeros(1)}, tmp_path / "x.safetensors")
    _refused("the tensors must match the config: unexpected extra", tmp_path / "x.safetensors", small)
    _refused("a ControlNet must be a diffusers folder or a .safetensors file; on a machine", tmp_path / "none", small)
    _refused("config belongs to single files", folder, small, config=folder)
    with pytest.raises(ValueError, match="_class_name must be 'ControlNetModel', got 'UNet2DConditionModel'"):
        engine.load_controlnet(small_folder / "unet", small)
    (tmp_path / "net.pth").write_bytes(b"x")
    _refused("pickle files can run code", tmp_path / "net.pth", small)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditioning_channels": 1}, "conditioning_channels must be 3, got 1"),
        ({"controlnet_conditioning_channel_order": "rbg"}, "channel_order must be rgb or bgr, got 'rbg'"),
        ({"conditioning_embedding_out_channels": [8, 0]}, "must be positive integers, got [8, 0]"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type must be None (SD-v1 family), got 'text_time'"),
        ({"num_union": 6}, "num_union = 6 is not part of the SD-v1 family"),
    ],
    ids=str,
)
def test_configs_that_are_not_read(small: engine.Engine, folder: Path, tmp_path: Path, changes, message: str) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / _FILE).write_bytes((folder / _FILE).read_bytes())
    with pytest.raises(ValueError, match=re.escape(message)):
        engine.load_controlnet(tmp_path, small)


def test_projections_may_be_linear_as_in_nets_of_sd_2(small: engine.Engine, folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"use_linear_projection": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / _FILE)
    linear = {name: x.flatten(1) if ".proj_" in name and x.ndim == 4 else x for name, x in tensors.items()}
    assert any(linear[name].ndim != x.ndim for name, x in tensors.items())
    save_file(linear, tmp_path / _FILE)
    ours, theirs = (engine.load_controlnet(where, small).state_dict() for where in (tmp_path, folder))
    assert all(torch.equal(ours[name], x) for name, x in theirs.items())
