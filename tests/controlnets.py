"""Small random ControlNets, made by diffusers and saved as its folders, whose zero convolutions are not zero."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import engine

HINT_CHANNELS = {
    "narrow": (8, 12),
    "sd_like": (8, 12, 16, 20),
    "deep_heads_per_block": (4, 6, 8),
}  # as the VAEs' factors


def make_controlnet(
    unet: diffusers.UNet2DConditionModel, hint_channels: tuple[int, ...], seed: int = 0, **options: Any
) -> diffusers.ControlNetModel:
    """One that fits a UNet, with random weights of its own."""
    torch.manual_seed(seed)
    net = diffusers.ControlNetModel.from_unet(unet, "rgb", hint_channels, load_weights_from_unet=False)
    config = {name: value for name, value in net.config.items() if not name.startswith("_")}  # with what is default
    net = diffusers.ControlNetModel.from_config({**config, **options})
    assert all(net.config[name] == value for name, value in options.items())
    zeros = [*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out]
    for conv in zeros:
        torch.nn.init.normal_(conv.weight, std=0.5 * conv.weight[0].numel() ** -0.5)
        torch.nn.init.normal_(conv.bias, std=0.05)
    return net.eval()


def random_controlnet(sd: engine.Engine, folder: Path, small_folder: Path, seed: int = 0, **options: Any) -> Any:
    """Of a model whose folder is ``small_folder``, made, saved in ``folder`` and loaded."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(small_folder / "unet")
    make_controlnet(unet, HINT_CHANNELS["narrow"], seed, **options).save_pretrained(folder)
    return engine.load_controlnet(folder, sd)


def listen(folder: Path, factor: float = 300.0) -> None:
    """Make a saved net's hint count more: beside random weights it hardly moves a pixel."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    tensors["controlnet_cond_embedding.conv_out.weight"] *= factor
    save_file(tensors, path)


def hint(seed: int = 0, height: int = 16, width: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
