"""Layers that the UNet and the VAE share, with diffusers' parameter names."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends.cudnn import CudnnConv2d
from ..backends.ops import Ops
from ..backends.packed_weights import PackedConv2d, PackedPointwiseConv2d


class GroupNorm(nn.GroupNorm):
    """GroupNorm that is as accurate in channels-last memory as elsewhere."""

    def __init__(self, groups: int, channels: int, eps: float, ops: Ops) -> None:
        super().__init__(groups, channels, eps)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.group_norm(x, self.weight, self.bias, self.num_groups, self.eps)


class GroupNormSiLU(GroupNorm):
    """``silu(group_norm(x + shift))``, statistics in float32."""

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return self.ops.group_norm_silu(x, shift, self.weight, self.bias, self.num_groups, self.eps)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution of stride 1, whose bias may be left to what comes after it."""

    bias: Tensor

    def __init__(self, in_channels: int, out_channels: int, ops: Ops) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.conv3x3(x, self.weight, self.bias)

    def without_bias(self, x: Tensor) -> Tensor:
        return self.ops.conv3x3(x, self.weight, None)


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution as the linear map it is, over the last axis of (..., C_in)."""

    bias: Tensor

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[:, :, 0, 0], self.bias)


class ResnetBlock2D(nn.Module):
    """Two normalised 3x3 convolutions around a residual, with an optional per-row shift in between.

    The first one's bias is part of the shift, which the second normalisation adds; the second one's is added with the
    residual.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.norm1 = GroupNormSiLU(groups, in_channels, eps, ops)
        self.conv1 = Conv3x3(in_channels, out_channels, ops)
        self.norm2 = GroupNormSiLU(groups, out_channels, eps, ops)
        self.conv2 = Conv3x3(out_channels, out_channels, ops)
        self.conv_shortcut = PointwiseConv2d(in_channels, out_channels) if in_channels != out_channels else None

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """``x`` is (B, C, h, w); ``shift`` (B, C_out) has the first convolution's bias in it; None for that alone."""
        shift = self.conv1.bias[None] if shift is None else shift
        if (small := self.ops.small_for(x.shape[2] * x.shape[3], *self.conv1.weight.shape[:2])) is not None:
            shortcut = self.conv_shortcut and (self.conv_shortcut.weight, self.conv_shortcut.bias)
            norm1, norm2 = ((norm.weight, norm.bias) for norm in (self.norm1, self.norm2))
            conv2, groups, eps = (self.conv2.weight, self.conv2.bias), self.norm1.num_groups, self.norm1.eps
            return small.resnet(x, shift, norm1, self.conv1.weight, norm2, conv2, shortcut, groups, eps)
        h = self.conv1.without_bias(self.norm1(x))
        h = self.conv2.without_bias(self.norm2(h, shift))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.ops.residual_add(h, x, self.conv2.bias)


class Downsample2D(nn.Module):
    """Halve height and width with a strided convolution; ``padding`` 0 pads right and bottom only, as the VAE does."""

    def __init__(self, channels: int, padding: int, ops: Ops) -> None:
        super().__init__()
        self.padding, self.ops = padding, ops
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        small = self.ops.small_for(x.shape[2] * x.shape[3], x.shape[1])
        if small is not None and self.padding:
            return small.convolution(x, self.conv.weight, self.conv.bias, stride=2)
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample2D(nn.Module):
    """Nearest-neighbour enlargement to ``size`` (h, w), then a convolution."""

    def __init__(self, channels: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.conv = Conv3x3(channels, channels, ops)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if (small := self.ops.small_for(size[0] * size[1], x.shape[1])) is not None:
            return small.convolution(x, self.conv.weight, self.conv.bias, size=size)
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


def pack_convolutions(model: nn.Module) -> None:
    """Replace a model's convolutions, but for those of ``Ops.conv3x3``, by packed ones with the same parameters."""
    replace_convolutions(model, PackedConv2d, PackedPointwiseConv2d)


def place_convolutions(model: nn.Module, backend: str, device: torch.device, benchmark: bool) -> None:
    """Convolutions as a backend on a device runs them best."""
    if backend == "native":
        pack_convolutions(model)
    elif device.type == "cuda":
        bind_convolutions(model, benchmark)


def bind_convolutions(model: nn.Module, benchmark: bool) -> None:
    """Replace those that a GPU runs by ones that no flag of the process changes; see ``backends/cudnn.py``."""
    replace_convolutions(model, lambda conv: CudnnConv2d(conv, benchmark))


def replace_convolutions(
    model: nn.Module,
    spatial: Callable[[nn.Conv2d], nn.Module],
    pointwise: Callable[[nn.Conv2d], nn.Module] | None = None,
) -> None:
    """Replace convolutions that are not of ``Ops.conv3x3``; those that are linear maps only where that is given."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d) and not isinstance(child, Conv3x3):
                replacement = pointwise if isinstance(child, PointwiseConv2d) else spatial
                if replacement is not None:
                    setattr(module, name, replacement(child))


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
