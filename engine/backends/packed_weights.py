"""Products on CPUs whose weights are kept in oneDNN's own layout too.

oneDNN brings plain weights into the layout of its kernels at every call, which takes a fifth of the time of a linear
layer, and of a convolution at few positions more than the convolution itself; at many positions it does not matter, and
a second copy would only take memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_FEW_POSITIONS = 512  # of the whole batch: SD v1.5's two rows of 16x16
_FEW_PRODUCTS = 1 << 22  # of a linear layer, for which calling oneDNN takes longer than MKL does in float32


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN has its own layouts for this dtype on this processor."""
    if dtype == torch.bfloat16:
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.backends.mkldnn.is_available() and dtype == torch.float32


class PackedWeights:
    """What was packed of weights, as long as these live; packed again after a change, by one thread alone."""

    def __init__(self) -> None:
        self._kept: Any = WeakTensorKeyDictionary()  # way of packing -> version and packed weight
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[PackedWeights], tuple[()]]:
        """A copy has nothing: packed weights cannot be copied or pickled."""
        return PackedWeights, ()

    def __len__(self) -> int:
        """How many weights there are."""
        return len(self._kept)

    def __call__(self, weight: Tensor, pack: Callable[[], Tensor], way: Hashable = None) -> Tensor:
        """A packed weight, which its caller must hold while it is used: another thread may replace it."""
        version = 0 if weight.is_inference() else weight._version
        ways = self._kept.get(weight)
        if ways is None or ways.get(way, (None, None))[0] != version:
            with self._lock:
                ways = self._kept.setdefault(weight, {})
                if ways.get(way, (None, None))[0] != version:
                    ways[way] = version, pack()
        return ways[way][1]


class PackedLinear:
    """Linear layers that pack a weight when they first meet it, and again after a change of it."""

    def __init__(self) -> None:
        self._packed = PackedWeights()

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``F.linear`` of a contiguous ``x``; a pointwise convolution's weight is one too."""
        if not can_pack(x.dtype) or not _is_worth_packing(x.numel() // x.shape[-1], weight):
            return F.linear(x, weight.flatten(1), bias)
        rows = x.numel() // x.shape[-1]
        packed = self._packed(weight, lambda: torch.ops.mkldnn._reorder_linear_weight(weight.flatten(1), rows))
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


class PackedConvolution:
    """Convolutions that pack a weight when they first meet few positions, and again after a change of it."""

    def __init__(self) -> None:
        self._packed = PackedWeights()

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]
    ) -> Tensor:
        """(B, C_in, h, w) to channels-last (B, C_out, h', w')."""
        if x.shape[0] * x.shape[2] * x.shape[3] > _FEW_POSITIONS or not can_pack(x.dtype):
            return F.conv2d(x, weight, bias, stride, padding)
        x = x.contiguous(memory_format=torch.channels_last)
        geometry = (padding, stride, (1, 1), 1)
        packed = self._packed(weight, lambda: torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, x.shape))
        return torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *geometry, "none", [], "")


class PackedConv2d(nn.Module):
    """A convolution with the same parameters and, at few positions, a packed weight."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.padding = conv.stride, cast(tuple[int, ...], conv.padding)
        self.convolution = PackedConvolution()

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x, self.weight, self.bias, self.stride, self.padding)


class PackedPointwiseConv2d(nn.Module):
    """A pointwise convolution, over the last axis, with the same parameters and a packed weight."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.linear = PackedLinear()

    def forward(self, x: Tensor) -> Tensor:
        """Over the last axis of (..., C_in)."""
        return self.linear(x, self.weight, self.bias)


def _is_worth_packing(rows: int, weight: Tensor) -> bool:
    """Whether a packed linear layer gains enough: in float32, which takes twice the memory, not all of them do.

    Those of few products are faster in MKL; at few rows, those to no more channels than they have gain least.
    """
    n_out, n_in = weight.shape[:2]
    if weight.dtype == torch.bfloat16:
        return True
    return rows * n_out * n_in >= _FEW_PRODUCTS and (rows > _FEW_POSITIONS or n_out > n_in)
