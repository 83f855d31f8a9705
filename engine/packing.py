"""Convolutions on CPUs whose weights are kept in oneDNN's own layout too, where that pays.

oneDNN brings plain weights into the layout of its kernels at every call. At few positions that takes longer than the
convolution itself; at many it does not matter, and a second copy would only take memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import PointwiseConv2d

_FEW_POSITIONS = 256  # of the whole batch: SD v1.5's two rows of 8x8


def pack_convolutions(model: nn.Module) -> None:
    """Replace the convolutions of a model, but for pointwise ones, by ones with the same parameters."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d) and not isinstance(child, PointwiseConv2d):
                setattr(module, name, PackedConv2d(child))


class PackedConv2d(nn.Module):
    """A convolution that packs its weight when it first meets few positions, and again after a change of the weight."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.padding = conv.stride, conv.padding
        self._packed: tuple[Tensor, int, Tensor] | None = None  # of which weight, in which version

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, h, w) to channels-last (B, C_out, h', w')."""
        return self._convolve(x, self.bias)

    def without_bias(self, x: Tensor) -> Tensor:
        return self._convolve(x, None)

    def _convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.shape[0] * x.shape[2] * x.shape[3] > _FEW_POSITIONS:
            return F.conv2d(x, self.weight, bias, self.stride, self.padding)
        x = x.contiguous(memory_format=torch.channels_last)
        geometry = (self.padding, self.stride, (1, 1), 1)
        weight, packed = self.weight, self._packed
        version = 0 if weight.is_inference() else weight._version
        if packed is None or packed[0] is not weight or packed[1] != version:
            packed = (weight, version, torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, x.shape))
            self._packed = packed
        return torch.ops.mkldnn._convolution_pointwise(x, packed[2], bias, *geometry, "none", [], "")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None}  # opaque: cannot be copied or pickled
