"""AutoencoderTiny, or TAESD (github.com/madebyollin/taesd): a small network that was taught what the VAE does.

Its latents are those that the UNet sees, so its scaling factor is 1. Pictures are in [-1, 1] outside, and in [0, 1]
within. Parameters have diffusers' names.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..backends.ops import TORCH, Ops
from .config import VAEConfig
from .vae import Autoencoder, AutoencoderKL

_BOUND = 3.0  # latents beyond are squeezed


@dataclass(frozen=True, slots=True)
class TinyVAEConfig:
    """Sizes of an ``AutoencoderTiny``; ``factor`` is the picture's size over the latent's.

    Attributes:
        latent_channels, channels: of the latents, and of every layer.
        encoder_blocks, decoder_blocks: how many residual blocks each level has, in the order in which they run.
    """

    latent_channels: int
    channels: int
    encoder_blocks: tuple[int, ...]
    decoder_blocks: tuple[int, ...]
    in_channels: int = 3
    out_channels: int = 3
    scaling_factor: float = 1.0

    @property
    def factor(self) -> int:
        return 2 ** (len(self.decoder_blocks) - 1)

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        return (self.channels,) * len(self.decoder_blocks)


class AutoencoderTinyBlock(nn.Module):
    """Three 3x3 convolutions around a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class EncoderTiny(nn.Module):
    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        C = config.channels
        layers: list[nn.Module] = []
        for level, n_blocks in enumerate(config.encoder_blocks):
            first = nn.Conv2d(C, C, 3, padding=1, stride=2, bias=False)
            layers.append(first if level else nn.Conv2d(config.in_channels, C, 3, padding=1))
            layers += [AutoencoderTinyBlock(C) for _ in range(n_blocks)]
        layers.append(nn.Conv2d(C, config.latent_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures in [-1, 1] (B, 3, H, W) to latents (B, 4, h, w)."""
        return self.layers((images + 1) / 2)


class DecoderTiny(nn.Module):
    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        C = config.channels
        layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, C, 3, padding=1), nn.ReLU()]
        for level, n_blocks in enumerate(config.decoder_blocks):
            layers += [AutoencoderTinyBlock(C) for _ in range(n_blocks)]
            if level < len(config.decoder_blocks) - 1:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(C, C, 3, padding=1, bias=False)]
        layers.append(nn.Conv2d(C, config.out_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, h, w), as the UNet sees them, to pictures near [-1, 1] (B, 3, H, W)."""
        return self.layers(torch.tanh(latents / _BOUND) * _BOUND) * 2 - 1


class AutoencoderTiny(Autoencoder):
    """What ``AutoencoderKL`` is to its callers, without a posterior: latents have no variance."""

    def __init__(self, config: TinyVAEConfig, ops: Ops = TORCH) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.encoder, self.decoder = EncoderTiny(config), DecoderTiny(config)

    @property
    def weight(self) -> Tensor:
        return self.decoder.layers[0].weight  # pyright: ignore[reportReturnType]

    def posterior(self, images: Tensor, slicing: bool = False, tiling: bool = False) -> tuple[Tensor, Tensor]:
        """Latents, and zeros for their standard deviation, each (B, 4, h, w); see ``AutoencoderKL.posterior``."""
        latents = self._encoded(self.encoder, images, slicing, tiling)
        return latents, torch.zeros_like(latents)

    def decode(self, latents: Tensor, slicing: bool = False, tiling: bool = False) -> Tensor:
        """Pictures (B, 3, H, W) near [-1, 1]; arguments as of ``AutoencoderKL.decode``."""
        return self._decoded(self.decoder, latents, slicing, tiling)


VAE = AutoencoderKL | AutoencoderTiny


def make_vae(config: VAEConfig | TinyVAEConfig, ops: Ops) -> VAE:
    """The autoencoder of a config."""
    return AutoencoderTiny(config, ops) if isinstance(config, TinyVAEConfig) else AutoencoderKL(config, ops)
