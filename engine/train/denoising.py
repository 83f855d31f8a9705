"""What every objective here shares: noisy latents and their squared error, on a UNet that gradients pass through."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..backends.ops import TORCH
from ..checks import check_integer
from ..engine import Engine
from ..models.conditioning import Conditioning
from ..models.transformer import Transformer2DModel
from ..models.unet import UNet2DConditionModel, UNetResnet
from ..sampling.schedule import alphas_cumprod

SAMPLE_SEEDS, SAMPLE_STEPS = (0, 1, 2, 3), 25  # of sample sheets


@dataclass(frozen=True, slots=True)
class Noised:
    """Latents (B, 4, h, w) float32 with noise of their timesteps (B,), and that noise."""

    latents: Tensor
    timesteps: Tensor
    noise: Tensor


class Noiser:
    """``z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) eps``, t uniform over the training schedule."""

    def __init__(self, sd: Engine) -> None:
        self.alphas_cumprod = torch.from_numpy(alphas_cumprod(sd.schedule)).float().to(sd.device)

    def __call__(self, latents: Tensor, generator: torch.Generator) -> Noised:
        timesteps = self.timesteps(len(latents), generator).to(latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        alpha_bar = self.alphas_cumprod[timesteps][:, None, None, None]
        return Noised(alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise, timesteps, noise)

    def timesteps(self, n: int, generator: torch.Generator) -> Tensor:
        """(n,) int64."""
        return torch.randint(0, len(self.alphas_cumprod), (n,), generator=generator)


def weighted_mean(error: Tensor, weights: Tensor | None) -> Tensor:
    """Mean of errors (B, C, h, w), or their mean over what masks (B, 1, h, w) mark."""
    if weights is None:
        return error.mean()
    return (weights * error).sum() / (weights.sum() * error.shape[1])


def check_trainable(sd: Engine) -> None:
    """Refuse inpainting models: what a concept learns on them would depend on masks that nobody gave."""
    if sd.limits.takes_masks:
        rule = "concepts are learned on a model of four input channels, and work on its inpainting model too"
        raise ValueError(f"{rule}; got one of {sd.unet.config.in_channels}: {sd.name!r}")


def training_size(sd: Engine, size: int | None) -> int:
    """The training resolution in pixels: as given, or the model's own."""
    factor = sd.vae.config.factor
    if size is None:
        return sd.unet.config.sample_size * factor
    if check_integer("size", size, factor) % factor:
        raise ValueError(f"size must be a multiple of {factor}, got {size}")
    return size


def autocast(sd: Engine) -> Any:
    """bfloat16 products on a GPU: float16's range is too small for gradients."""
    if sd.device.type == "cuda" and sd.dtype != torch.bfloat16:
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def differentiable(unet: UNet2DConditionModel, gradient_checkpointing: bool) -> UNet2DConditionModel:
    """The same UNet, sharing its weights, on ops that have gradients."""
    with torch.device("meta"):
        twin = UNet2DConditionModel(unet.config, TORCH)
    twin.load_state_dict(dict(unet.named_parameters()), assign=True)
    twin.eval().requires_grad_(False)
    if gradient_checkpointing:
        for layers in [module for module in twin.modules() if isinstance(module, nn.ModuleList)]:
            for i, layer in enumerate(layers):
                if isinstance(layer, UNetResnet | Transformer2DModel):
                    layers[i] = _Recomputed(layer)
    return twin


class _Recomputed(nn.Module):
    """A layer whose activations are not kept but recomputed in the backward pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, condition: Conditioning) -> Any:
        return checkpoint(self.layer, x, condition, use_reentrant=False)
