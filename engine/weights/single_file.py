"""Whole checkpoints as single files in the original layout, which most other programs read."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from ..models.config import ScheduleConfig
from ..models.tiny_vae import VAE
from ..models.unet import UNet2DConditionModel
from ..models.vae import AutoencoderKL
from . import ldm

_HEADS, _GROUPS, _SCALING = 8, 32, 0.18215  # what those who read such a file take, which does not tell them


def save_single_file(
    path: Path,
    unet: UNet2DConditionModel,
    vae: VAE,
    text: nn.Module,
    schedule: ScheduleConfig,
    dtype: torch.dtype,
) -> None:
    """Write a model's weights, and replace an existing file in one step.

    Raises:
        ValueError: the file could not tell how to use them, since heads, groups, scaling factor or schedule are not SD
            v1's; or a weight exceeds ``dtype``'s range.
    """
    if not isinstance(vae, AutoencoderKL):
        raise ValueError(f"a single file holds an AutoencoderKL, got {type(vae).__name__}; load the model's own VAE")
    for name, found, expected in (
        ("heads", set(unet.config.n_heads), {_HEADS}),
        ("groups", {unet.config.norm_num_groups, vae.config.norm_num_groups}, {_GROUPS}),
        ("the VAE's scaling_factor", {vae.config.scaling_factor}, {_SCALING}),
        ("the schedule", {schedule}, {ScheduleConfig()}),
    ):
        if found != expected:
            rule = f"a single file does not tell {name}, so that must be SD v1's"
            raise ValueError(f"{rule}, {expected.pop()}, got {', '.join(map(str, found))}")
    tensors = {ldm.unet_name(unet.config, key): weight for key, weight in unet.state_dict().items()}
    for key, weight in vae.state_dict().items():
        name = ldm.vae_name(vae.config, key)
        tensors[name] = weight[:, :, None, None] if ".attn_1." in name and weight.ndim == 2 else weight
    for key, weight in text.state_dict().items():
        tensors[ldm.TEXT_PREFIXES[0] + key.removeprefix("text_model.")] = weight
    cast = {name: weight.cpu().to(dtype).contiguous() for name, weight in tensors.items()}
    for name, weight in cast.items():
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name}: values overflow {dtype}; write float32 or bfloat16")
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(cast, partial, {"format": "pt"})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
