"""Single-file checkpoints: names checked by hand, and a round trip through our own inverse map."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import engine
from engine.errors import CheckpointError
from engine.models.config import UNetConfig, VAEConfig
from engine.models.unet import UNet2DConditionModel
from engine.models.vae import AutoencoderKL
from engine.weights import ldm
from tests.models.test_config import _VAE
from tests.pipelines import SD_V1_5_UNET, SHAPES, save_pipeline

_UNET_NAMES = {
    "conv_in.weight": "input_blocks.0.0.weight",
    "time_embedding.linear_1.weight": "time_embed.0.weight",
    "time_embedding.linear_2.bias": "time_embed.2.bias",
    "down_blocks.0.resnets.0.norm1.weight": "input_blocks.1.0.in_layers.0.weight",
    "down_blocks.0.resnets.1.conv1.weight": "input_blocks.2.0.in_layers.2.weight",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    ),
    "down_blocks.0.attentions.1.norm.bias": "input_blocks.2.1.norm.bias",
    "down_blocks.0.attentions.1.transformer_blocks.0.norm1.bias": "input_blocks.2.1.transformer_blocks.0.norm1.bias",
    "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
    "down_blocks.1.resnets.0.conv_shortcut.weight": "input_blocks.4.0.skip_connection.weight",
    "down_blocks.2.downsamplers.0.conv.bias": "input_blocks.9.0.op.bias",
    "down_blocks.3.resnets.1.time_emb_proj.weight": "input_blocks.11.0.emb_layers.1.weight",
    "mid_block.resnets.0.conv2.weight": "middle_block.0.out_layers.3.weight",
    "mid_block.attentions.0.proj_in.weight": "middle_block.1.proj_in.weight",
    "mid_block.resnets.1.norm2.weight": "middle_block.2.out_layers.0.weight",
    "up_blocks.0.resnets.2.conv1.weight": "output_blocks.2.0.in_layers.2.weight",
    "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
    "up_blocks.1.attentions.0.proj_out.weight": "output_blocks.3.1.proj_out.weight",
    "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
    "up_blocks.2.upsamplers.0.conv.bias": "output_blocks.8.2.conv.bias",
    "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj.weight": (
        "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight"
    ),
    "conv_norm_out.weight": "out.0.weight",
    "conv_out.bias": "out.2.bias",
}
_VAE_NAMES = {
    "encoder.conv_in.weight": "encoder.conv_in.weight",
    "encoder.down_blocks.0.resnets.1.conv2.bias": "encoder.down.0.block.1.conv2.bias",
    "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": "encoder.down.1.block.0.nin_shortcut.weight",
    "encoder.down_blocks.2.downsamplers.0.conv.weight": "encoder.down.2.downsample.conv.weight",
    "encoder.mid_block.attentions.0.to_q.weight": "encoder.mid.attn_1.q.weight",
    "encoder.mid_block.attentions.0.to_out.0.bias": "encoder.mid.attn_1.proj_out.bias",
    "encoder.mid_block.resnets.1.norm1.weight": "encoder.mid.block_2.norm1.weight",
    "encoder.conv_norm_out.weight": "encoder.norm_out.weight",
    "decoder.mid_block.attentions.0.group_norm.weight": "decoder.mid.attn_1.norm.weight",
    "decoder.mid_block.resnets.0.conv1.weight": "decoder.mid.block_1.conv1.weight",
    "decoder.up_blocks.0.resnets.2.conv1.weight": "decoder.up.3.block.2.conv1.weight",
    "decoder.up_blocks.2.upsamplers.0.conv.weight": "decoder.up.1.upsample.conv.weight",
    "decoder.up_blocks.3.resnets.0.conv_shortcut.bias": "decoder.up.0.block.0.nin_shortcut.bias",
    "decoder.conv_out.weight": "decoder.conv_out.weight",
    "quant_conv.weight": "quant_conv.weight",
    "post_quant_conv.bias": "post_quant_conv.bias",
}


def test_names_by_hand() -> None:
    unet, vae = UNetConfig.from_dict(SD_V1_5_UNET), VAEConfig.from_dict(_VAE)
    for ours, theirs in _UNET_NAMES.items():
        assert ldm.unet_name(unet, ours) == f"model.diffusion_model.{theirs}"
    for ours, theirs in _VAE_NAMES.items():
        assert ldm.vae_name(vae, ours) == f"first_stage_model.{theirs}"


def test_sd15_counts_and_uniqueness() -> None:
    """SD v1.5 has 686 UNet and 248 VAE tensors, each with a name of its own."""
    unet_config, vae_config = UNetConfig.from_dict(SD_V1_5_UNET), VAEConfig.from_dict(_VAE)
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(unet_config), AutoencoderKL(vae_config)
    names = {ldm.unet_name(unet_config, key) for key in unet.state_dict()}
    assert len(names) == len(unet.state_dict()) == 686
    names = {ldm.vae_name(vae_config, key) for key in vae.state_dict()}
    assert len(names) == len(vae.state_dict()) == 248
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964


def write_single_file(folder: Path, path: Path) -> None:
    """Write a diffusers folder in the original layout, with what real checkpoints also hold."""
    sd = engine.load(folder)
    tensors = {ldm.unet_name(sd.unet.config, key): value for key, value in sd.unet.state_dict().items()}
    for key, value in sd.vae.state_dict().items():
        name = ldm.vae_name(sd.vae.config, key)
        conv = ".attn_1." in name and value.ndim == 2
        tensors[name] = value[:, :, None, None] if conv else value
    for key, value in sd.text_encoder.model.state_dict().items():
        tensors[ldm.TEXT_PREFIXES[0] + key.removeprefix("text_model.")] = value
    tensors[f"{ldm.TEXT_PREFIXES[0]}embeddings.position_ids"] = torch.arange(77)[None]
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    tensors["alphas_cumprod"] = torch.rand(1000)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_with_configs(tmp_path: Path, shape: str) -> None:
    folder, path = tmp_path / "folder", tmp_path / "model.safetensors"
    save_pipeline(shape, folder)
    write_single_file(folder, path)
    arguments = {"prompt": "a cat", "seed": 0, "steps": 2, "progress": False}
    expected = engine.load(folder).generate(**arguments)
    actual = engine.load(path, config=folder).generate(**arguments)
    assert torch.equal(actual.latents, expected.latents)
    assert actual.settings["model"] == "model"


def test_sizes_from_shapes(tmp_path: Path) -> None:
    """Without configs, sizes come from the shapes, and head and group counts are SD v1's 8 and 32."""
    folder, path = tmp_path / "folder", tmp_path / "model.safetensors"
    save_pipeline("sd_like", folder)
    write_single_file(folder, path)
    sd, expected = engine.load(path), engine.load(folder)
    sample, context = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32)
    assert torch.equal(sd.unet(sample, 3, context), expected.unet(sample, 3, context))
    assert torch.equal(sd.vae.decode(sample), expected.vae.decode(sample))
    with pytest.raises(ValueError, match=r"must fit the text encoder's 708 tokens, got 49408; .*config=folder"):
        sd.generate("a cat")


def test_configs_beside_the_file(tmp_path: Path) -> None:
    save_pipeline("narrow", tmp_path)
    write_single_file(tmp_path, tmp_path / "model.safetensors")
    expected = engine.load(tmp_path).generate("a cat", seed=0, steps=2, progress=False)
    actual = engine.load(tmp_path / "model.safetensors").generate("a cat", seed=0, steps=2, progress=False)
    assert torch.equal(actual.latents, expected.latents)


def test_clip_tokenizer_comes_along() -> None:
    """The bundled vocabulary is CLIP's: these ids are the published ones."""
    from transformers import CLIPTokenizer

    from engine.weights.checkpoint import ASSETS

    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "clip")
    assert tokenizer("a photo of a cat")["input_ids"] == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert len(tokenizer) == 49408


def test_other_single_files(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({"lora.up": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="not an SD checkpoint in the original layout"):
        engine.load(path)
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"middle_block.* is missing"):
        engine.load(path)


def test_text_without_its_old_prefix(tmp_path: Path) -> None:
    """As transformers 5 names it, and as some merging programs have written it before."""
    save_pipeline("sd_like", tmp_path / "folder")
    write_single_file(tmp_path / "folder", tmp_path / "old.safetensors")
    old, new = ldm.TEXT_PREFIXES
    tensors = {name.replace(old, new): tensor for name, tensor in load_file(tmp_path / "old.safetensors").items()}
    save_file(tensors, tmp_path / "new.safetensors")
    states = [engine.load(tmp_path / f"{name}.safetensors").text_encoder.model.state_dict() for name in ("old", "new")]
    assert all(torch.equal(weight, states[1][name]) for name, weight in states[0].items())


def test_a_checkpoint_without_a_vae_takes_one(tmp_path: Path) -> None:
    folder, path = tmp_path / "folder", tmp_path / "model.safetensors"
    save_pipeline("sd_like", folder)
    write_single_file(folder, path)
    pruned = {name: one for name, one in load_file(path).items() if not name.startswith(ldm.VAE_PREFIX)}
    save_file(pruned, tmp_path / "pruned.safetensors")
    with pytest.raises(CheckpointError, match=r"pruned.safetensors: it holds no VAE; give one beside it: .*vae="):
        engine.load(tmp_path / "pruned.safetensors")
    sd, latents = engine.load(tmp_path / "pruned.safetensors", vae=folder), torch.randn(1, 4, 8, 8)
    assert torch.equal(sd.vae.decode(latents), engine.load(folder).vae.decode(latents))
