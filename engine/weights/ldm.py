"""The original latent-diffusion layout of single-file checkpoints, in terms of diffusers' parameter names.

Names are derived from the configuration, block by block; sizes, where no configuration is given, from the shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from ..models.config import UNetConfig, VAEConfig

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CONTROL_PREFIX = "control_model."
TEXT_PREFIXES = ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.")  # in old files, in new

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(config: UNetConfig, key: str) -> str:
    """The LDM name of the UNet parameter that diffusers calls ``key``."""
    return UNET_PREFIX + _longest_prefix(_unet_blocks(config), key, _RESNET)


def vae_name(config: VAEConfig, key: str) -> str:
    """The LDM name of the VAE parameter that diffusers calls ``key``."""
    renames = {"conv_shortcut": "nin_shortcut"} | _VAE_ATTENTION
    return VAE_PREFIX + _longest_prefix(_vae_blocks(config), key, renames)


def controlnet_name(config: UNetConfig, n_hint_blocks: int, key: str) -> str:
    """The LDM name of the ControlNet parameter that diffusers calls ``key``."""
    n_skips = len(config.block_out_channels) * (config.layers_per_block + 1)
    hint = "controlnet_cond_embedding"
    blocks = _unet_blocks(config) | {
        **{f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(n_skips)},
        **{f"{hint}.blocks.{i}": f"input_hint_block.{2 * i + 2}" for i in range(n_hint_blocks)},
        "controlnet_mid_block": "middle_block_out.0",
        f"{hint}.conv_in": "input_hint_block.0",
        f"{hint}.conv_out": f"input_hint_block.{2 * n_hint_blocks + 2}",
    }
    return CONTROL_PREFIX + _longest_prefix(blocks, key, _RESNET)


def _longest_prefix(blocks: Mapping[str, str], key: str, layers: Mapping[str, str]) -> str:
    """Replace the block at the front of ``key`` through ``blocks``, and the layer behind it through ``layers``."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        block, rest = ".".join(parts[:length]), ".".join(parts[length:])
        if block in blocks:
            for theirs, ours in layers.items():
                if rest.startswith(f"{theirs}."):
                    rest = ours + rest[len(theirs) :]
                    break
            return f"{blocks[block]}.{rest}"
    return key


def _unet_blocks(config: UNetConfig) -> dict[str, str]:
    depth, n = config.layers_per_block, len(config.block_out_channels)
    blocks = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for i in range(n):
        for j in range(depth):
            at = 1 + i * (depth + 1) + j
            blocks[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{at}.0"
            blocks[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{at}.1"
        blocks[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(i + 1) * (depth + 1)}.0.op"
        for j in range(depth + 1):
            at = i * (depth + 1) + j
            blocks[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{at}.0"
            blocks[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{at}.1"
        place = 2 if config.down_has_attention[n - 1 - i] else 1
        blocks[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{i * (depth + 1) + depth}.{place}.conv"
    return blocks


def _vae_blocks(config: VAEConfig) -> dict[str, str]:
    n, depth = len(config.block_out_channels), config.layers_per_block
    blocks = {}
    for side in ("encoder", "decoder"):
        blocks[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        blocks[f"{side}.mid_block.resnets.0"] = f"{side}.mid.block_1"
        blocks[f"{side}.mid_block.attentions.0"] = f"{side}.mid.attn_1"
        blocks[f"{side}.mid_block.resnets.1"] = f"{side}.mid.block_2"
    for i in range(n):
        for j in range(depth):
            blocks[f"encoder.down_blocks.{i}.resnets.{j}"] = f"encoder.down.{i}.block.{j}"
        blocks[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv"
        for j in range(depth + 1):
            blocks[f"decoder.up_blocks.{i}.resnets.{j}"] = f"decoder.up.{n - 1 - i}.block.{j}"
        blocks[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"decoder.up.{n - 1 - i}.upsample.conv"
    return blocks


SD_V1_VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def infer_configs(
    shapes: Mapping[str, tuple[int, ...]], text_prefix: str = TEXT_PREFIXES[0], has_vae: bool = True
) -> dict[str, dict[str, Any]]:
    """Diffusers-style configs for "unet", "vae" and "text_encoder" from a single file's tensor shapes.

    Shapes do not tell head and group counts: SD v1's 8 heads and 32 groups are taken, and its VAE where there is none.
    """
    try:
        vae = infer_vae(shapes) if has_vae else SD_V1_VAE
        return {"unet": _infer_unet(shapes), "vae": vae, "text_encoder": _infer_text(shapes, text_prefix)}
    except KeyError as error:
        raise CheckpointError(f"not an SD-v1 checkpoint in the original layout: {error.args[0]} is missing") from error


def _infer_unet(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    channels: list[int] = []
    attention: list[bool] = []
    depth, at = 0, 1
    while f"{UNET_PREFIX}input_blocks.{at}.0.in_layers.2.weight" in shapes:
        first = at
        while f"{UNET_PREFIX}input_blocks.{at}.0.in_layers.2.weight" in shapes:
            at += 1
        depth = at - first
        channels.append(shapes[f"{UNET_PREFIX}input_blocks.{first}.0.in_layers.2.weight"][0])
        attention.append(f"{UNET_PREFIX}input_blocks.{first}.1.proj_in.weight" in shapes)
        at += 1  # the downsampler
    text_width = shapes[f"{UNET_PREFIX}middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1]
    conv_in = shapes[f"{UNET_PREFIX}input_blocks.0.0.weight"]
    down = ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention]
    up = ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)]
    return {
        "in_channels": conv_in[1],
        "out_channels": shapes[f"{UNET_PREFIX}out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": depth,
        "down_block_types": down,
        "up_block_types": up,
        "cross_attention_dim": text_width,
        "attention_head_dim": 8,
    }


def infer_vae(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    channels: list[int] = []
    while f"{VAE_PREFIX}encoder.down.{len(channels)}.block.0.conv1.weight" in shapes:
        channels.append(shapes[f"{VAE_PREFIX}encoder.down.{len(channels)}.block.0.conv1.weight"][0])
    depth = sum(f"{VAE_PREFIX}encoder.down.0.block.{j}.conv1.weight" in shapes for j in range(16))
    return {
        "in_channels": shapes[f"{VAE_PREFIX}encoder.conv_in.weight"][1],
        "out_channels": shapes[f"{VAE_PREFIX}decoder.conv_out.weight"][0],
        "latent_channels": shapes[f"{VAE_PREFIX}decoder.conv_in.weight"][1],
        "block_out_channels": channels,
        "layers_per_block": depth,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    }


def _infer_text(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, Any]:
    vocabulary, width = shapes[f"{prefix}embeddings.token_embedding.weight"]
    layers = 0
    while f"{prefix}encoder.layers.{layers}.mlp.fc1.weight" in shapes:
        layers += 1
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": layers,
        "num_attention_heads": max(width // 64, 1),
        "max_position_embeddings": shapes[f"{prefix}embeddings.position_embedding.weight"][0],
        "hidden_act": "quick_gelu",
    }
