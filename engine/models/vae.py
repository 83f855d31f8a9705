"""AutoencoderKL of the SD-v1 family (Rombach et al. 2022, arXiv:2112.10752, appendix G).

Latents here are unscaled: multiply by ``config.scaling_factor`` for what the UNet sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.ops import TORCH, Ops
from .config import VAEConfig
from .layers import Downsample2D, GroupNorm, GroupNormSiLU, ResnetBlock2D, Upsample2D

_EPS = 1e-6
_TILE = 64  # latent positions along a tile's side
_OVERLAP = 16

Network = Callable[[Tensor], Tensor]


class VAEAttention(nn.Module):
    """Single-head self-attention over all positions, around a residual."""

    def __init__(self, channels: int, groups: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.group_norm = GroupNorm(groups, channels, _EPS, ops)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        B, C, height, width = x.shape
        tokens = self.group_norm(x).permute(0, 2, 3, 1).reshape(B, height * width, C)
        tokens = self.to_out[0](self.ops.attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens), 1))
        return x + tokens.reshape(B, height, width, C).permute(0, 3, 1, 2)


class MidBlock2D(nn.Module):
    def __init__(self, channels: int, groups: int, ops: Ops) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock2D(channels, channels, groups, _EPS, ops) for _ in range(2)])
        self.attentions = nn.ModuleList([VAEAttention(channels, groups, ops)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class DownEncoderBlock2D(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, config: VAEConfig, last: bool, ops: Ops) -> None:
        super().__init__()
        channels = [in_channels] + [out_channels] * (config.layers_per_block - 1)
        resnets = [ResnetBlock2D(c, out_channels, config.norm_num_groups, _EPS, ops) for c in channels]
        self.resnets = nn.ModuleList(resnets)
        self.downsamplers = None if last else nn.ModuleList([Downsample2D(out_channels, padding=0, ops=ops)])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.downsamplers is None else self.downsamplers[0](x)


class UpDecoderBlock2D(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, config: VAEConfig, last: bool, ops: Ops) -> None:
        super().__init__()
        channels = [in_channels] + [out_channels] * config.layers_per_block
        resnets = [ResnetBlock2D(c, out_channels, config.norm_num_groups, _EPS, ops) for c in channels]
        self.resnets = nn.ModuleList(resnets)
        self.upsamplers = None if last else nn.ModuleList([Upsample2D(out_channels, ops)])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        if self.upsamplers is None:
            return x
        height, width = x.shape[-2:]
        return self.upsamplers[0](x, size=(2 * height, 2 * width))


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig, ops: Ops) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        ends = zip((widths[0], *widths[:-1]), widths, strict=True)
        blocks = [DownEncoderBlock2D(a, b, config, i == len(widths) - 1, ops) for i, (a, b) in enumerate(ends)]
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block = MidBlock2D(widths[-1], groups, ops)
        self.conv_norm_out = GroupNormSiLU(groups, widths[-1], _EPS, ops)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x)))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig, ops: Ops) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock2D(widths[0], groups, ops)
        ends = zip((widths[0], *widths[:-1]), widths, strict=True)
        blocks = [UpDecoderBlock2D(a, b, config, i == len(widths) - 1, ops) for i, (a, b) in enumerate(ends)]
        self.up_blocks = nn.ModuleList(blocks)
        self.conv_norm_out = GroupNormSiLU(groups, widths[-1], _EPS, ops)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x))


class Autoencoder(nn.Module):
    """What all autoencoders have in common: pictures in [-1, 1] (B, 3, H, W), latents (B, 4, H/factor, W/factor).

    Attributes:
        config: with ``factor``, ``in_channels`` and ``latent_channels``.
    """

    config: Any

    @property
    def weight(self) -> Tensor:
        """One of its weights, for device and dtype."""
        raise NotImplementedError

    def posterior(self, images: Tensor, slicing: bool = False, tiling: bool = False) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def encode(self, images: Tensor) -> Tensor:
        """The posterior's mean: unscaled latents (B, 4, h, w)."""
        return self.posterior(images)[0]

    def _encoded(self, network: Network, images: Tensor, slicing: bool, tiling: bool) -> Tensor:
        factor, channels = self.config.factor, self.config.in_channels
        if images.ndim != 4 or images.shape[1] != channels or any(n % factor for n in images.shape[2:]):
            rule = f"images must be (B, {channels}, H, W) with H and W multiples of {factor}"
            raise ValueError(f"{rule}, got {tuple(images.shape)}")
        return self._run(network, images, (factor, 1), slicing, tiling)

    def _decoded(self, network: Network, latents: Tensor, slicing: bool, tiling: bool) -> Tensor:
        if latents.ndim != 4 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(f"latents must be (B, {self.config.latent_channels}, h, w), got {tuple(latents.shape)}")
        return self._run(network, latents, (1, self.config.factor), slicing, tiling)

    def _run(self, network: Network, x: Tensor, units: tuple[int, int], slicing: bool, tiling: bool) -> Tensor:
        x = x.to(self.weight.dtype)
        rows = x.split(1) if slicing else [x]
        return torch.cat([blend_tiles(network, row, units) if tiling else network(row) for row in rows])


class AutoencoderKL(Autoencoder):
    """An autoencoder whose latents are drawn from a Gaussian."""

    def __init__(self, config: VAEConfig, ops: Ops = TORCH) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.encoder = Encoder(config, ops)
        self.decoder = Decoder(config, ops)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    @property
    def weight(self) -> Tensor:
        return self.quant_conv.weight

    def posterior(self, images: Tensor, slicing: bool = False, tiling: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents' Gaussian, unscaled, each (B, 4, h, w); flags as in ``decode``."""
        mean, log_variance = self._encoded(self._moments, images, slicing, tiling).chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))

    def decode(self, latents: Tensor, slicing: bool = False, tiling: bool = False) -> Tensor:
        """Pictures (B, 3, H, W) near [-1, 1] from unscaled latents (B, 4, h, w).

        Args:
            latents: unscaled latents of any h and w.
            slicing: decode one row at a time, with the same result and less memory.
            tiling: decode overlapping tiles of 64x64 latents and blend them. For large pictures; the result differs
                slightly, since normalisation and attention see one tile at a time.
        """
        return self._decoded(self._pixels, latents, slicing, tiling)

    def _moments(self, images: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(images))

    def _pixels(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))


def blend_tiles(network: Network, x: Tensor, units: tuple[int, int]) -> Tensor:
    """Run a network on overlapping tiles and average its results with weights that fall linearly to the tiles' edges.

    Args:
        network: a map that changes height and width by the ratio of ``units``.
        x: (B, C, h, w).
        units: how many positions of the input and of the output make one latent position.
    """
    unit_in, unit_out = units
    height, width = (n // unit_in for n in x.shape[2:])
    total = weight = x.new_zeros(())
    for top in _tile_starts(height):
        for left in _tile_starts(width):
            rows, cols = slice(top * unit_in, (top + _TILE) * unit_in), slice(left * unit_in, (left + _TILE) * unit_in)
            tile = network(x[:, :, rows, cols])
            if not total.ndim:
                total = tile.new_zeros(*tile.shape[:2], height * unit_out, width * unit_out)
                weight = torch.zeros_like(total[:1, :1])
            h, w = tile.shape[2:]
            ramp = (_ramp(h, unit_out)[:, None] * _ramp(w, unit_out)).to(tile)
            rows, cols = slice(top * unit_out, top * unit_out + h), slice(left * unit_out, left * unit_out + w)
            total[:, :, rows, cols] += tile * ramp
            weight[:, :, rows, cols] += ramp
    return total / weight


def _tile_starts(length: int) -> list[int]:
    """First positions of tiles that cover ``length``, the last one flush with the end."""
    if length <= _TILE:
        return [0]
    return [*range(0, length - _TILE, _TILE - _OVERLAP), length - _TILE]


def _ramp(length: int, unit: int) -> Tensor:
    """Weights that rise over the overlap at both ends, positive everywhere."""
    distance = torch.arange(length, dtype=torch.float32, device="cpu")
    distance = torch.minimum(distance, distance.flip(0)) + 1
    return (distance / (_OVERLAP * unit)).clamp(max=1.0)
