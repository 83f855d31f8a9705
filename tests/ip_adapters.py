"""IP-Adapter files of both kinds in the original layout, and a small CLIP for pictures, with random weights."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import engine

EMBED, HIDDEN, N_PLAIN, N_PLUS = 24, 32, 4, 6
KINDS = ("plain", "plus")


def write_image_encoder(folder: Path, seed: int = 0, **sizes: int) -> Path:
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    config |= {"image_size": 28, "patch_size": 14, "projection_dim": EMBED}
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**config | sizes)).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:  # as transformers begins, all pictures look alike
            parameter.data.normal_(std=0.4 / parameter[0].numel() ** 0.5)
    model.save_pretrained(folder)
    return folder


def adapter_tensors(layers: Mapping[str, tuple[int, int]], kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """A file's tensors.

    Args:
        layers: the cross-attention layers' (C, E), in the order of diffusers' modules.
        kind: of ``KINDS``.
    """
    generator = torch.Generator().manual_seed(seed)

    def linear(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    def norm(name: str, width: int) -> dict[str, torch.Tensor]:
        return {
            f"image_proj.{name}.weight": 1 + 0.2 * torch.randn(width, generator=generator),
            f"image_proj.{name}.bias": 0.2 * torch.randn(width, generator=generator),
        }

    text_width = next(iter(layers.values()))[1]
    if kind == "plain":
        tensors = {"image_proj.proj.weight": linear(N_PLAIN * text_width, EMBED)}
        tensors |= {"image_proj.proj.bias": linear(N_PLAIN * text_width)} | norm("norm", text_width)
    else:
        channels, inner = 48, 128
        tensors = {
            "image_proj.latents": torch.randn(1, N_PLUS, channels, generator=generator),
            "image_proj.proj_in.weight": linear(channels, HIDDEN),
            "image_proj.proj_in.bias": linear(channels),
            "image_proj.proj_out.weight": linear(text_width, channels),
            "image_proj.proj_out.bias": linear(text_width),
            **norm("norm_out", text_width),
        }
        for i in range(4):
            layer = f"layers.{i}"
            tensors |= norm(f"{layer}.0.norm1", channels) | norm(f"{layer}.0.norm2", channels)
            tensors |= norm(f"{layer}.1.0", channels)
            for name, shape in (
                ("0.to_q", (inner, channels)),
                ("0.to_kv", (2 * inner, channels)),
                ("0.to_out", (channels, inner)),
                ("1.1", (4 * channels, channels)),
                ("1.3", (channels, 4 * channels)),
            ):
                tensors[f"image_proj.{layer}.{name}.weight"] = linear(*shape)
    for i, shape in enumerate(layers.values()):
        for part in ("to_k_ip", "to_v_ip"):
            tensors[f"ip_adapter.{2 * i + 1}.{part}.weight"] = 2 * linear(*shape)
    return tensors


def layers_of(sd: engine.Engine) -> dict[str, tuple[int, int]]:
    """An Engine's cross-attention layers as ``adapter_tensors`` takes them."""
    layers = sd.unet.cross_attentions.items()
    shapes = {name: (attn2.to_k.out_features, attn2.to_k.in_features) for name, attn2 in layers}
    order = sorted(shapes, key=lambda name: "dum".index(name[0]))  # down, up, mid
    return {name: shapes[name] for name in order}


def load_adapter(sd: engine.Engine, folder: Path, kind: str, seed: int = 0) -> engine.IPAdapter:
    """An adapter of random weights for an Engine."""
    path = folder / f"{kind}-{seed}.safetensors"
    save_file(adapter_tensors(layers_of(sd), kind, seed), path)
    if not (folder / "image_encoder").is_dir():
        write_image_encoder(folder / "image_encoder")
    return engine.IPAdapter.load(path, sd, image_encoder=folder / "image_encoder")


def random_adapter(sd: engine.Engine, kind: str, seed: int = 0) -> engine.IPAdapter:
    """The same where no folder is at hand."""
    with tempfile.TemporaryDirectory() as folder:
        return load_adapter(sd, Path(folder), kind, seed)


def picture(seed: int = 0, size: tuple[int, int] = (40, 32)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
