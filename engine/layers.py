"""Layers that the UNet and the VAE share, with diffusers' parameter names."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import Ops


class GroupNorm(nn.GroupNorm):
    """GroupNorm that is as accurate in channels-last memory as elsewhere."""

    def __init__(self, groups: int, channels: int, eps: float, ops: Ops) -> None:
        super().__init__(groups, channels, eps)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.group_norm(x, self.weight, self.bias, self.num_groups, self.eps)


class GroupNormSiLU(GroupNorm):
    """``silu(group_norm(x))``, statistics in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis."""

    def __init__(self, channels: int, ops: Ops) -> None:
        super().__init__(channels)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.layer_norm(x, self.weight, self.bias, self.eps)


class ResnetBlock2D(nn.Module):
    """Two normalised 3x3 convolutions around a residual, with an optional per-row shift in between."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(groups, in_channels, eps, ops)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNormSiLU(groups, out_channels, eps, ops)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """``x`` is (B, C, h, w); ``shift`` (B, C_out) is the projected time embedding."""
        h = self.conv1(self.norm1(x))
        if shift is not None:
            h += shift[:, :, None, None]
        h = self.conv2(self.norm2(h))
        h += x if self.conv_shortcut is None else self.conv_shortcut(x)
        return h


class Downsample2D(nn.Module):
    """Halve height and width with a strided convolution; ``padding`` 0 pads right and bottom only, as the VAE does."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample2D(nn.Module):
    """Nearest-neighbour enlargement to ``size`` (h, w), then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


def timestep_embedding(timesteps: Tensor, channels: int) -> Tensor:
    """Sinusoidal embedding ``[cos | sin]`` of timesteps (Vaswani et al. 2017; Ho et al. 2020), float32.

    Args:
        timesteps: (B,), any real dtype.
        channels: width of the result, even.
    """
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.to(torch.float32)[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
