"""Convolutions on a GPU: cuDNN's, with what torch has as process-wide flags given to every call.

Two of the flags would be wrong as they stand. TF32 is on for convolutions, so that "float32" would mean products of ten
bits; and what a call without ``benchmark`` chose by rule is kept for all later ones of its shape, ``benchmark`` or not.
Flags that are set around a run would be seen by all other threads, and lost where two such runs overlap; those that are
arguments of a call are seen by it alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

Convolve = Callable[..., Tensor]


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (1, 1),
    *,
    benchmark: bool,
) -> Tensor:
    """``F.conv2d``, in float32 without TF32.

    Args:
        x, weight, bias: (B, C, h, w), (C_out, C, u, v), and (C_out,) or None, of one dtype.
        stride, padding: of both axes.
        benchmark: choose algorithms by timing them where a shape is first met; not while torch must be deterministic.
    """
    cudnn: Any = torch.backends.cudnn
    deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    benchmark = benchmark and not deterministic
    # in half precision the last flag means nothing but is part of what choices are kept under
    tf32 = x.dtype != torch.float32 and not benchmark
    flags = benchmark, deterministic, cudnn.enabled, tf32
    return torch._convolution(x, weight, bias, stride, padding, (1, 1), False, (0, 0), 1, *flags)


class CudnnConv2d(nn.Module):
    """A convolution with the same parameters, through ``convolve``."""

    def __init__(self, conv: nn.Conv2d, benchmark: bool) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.padding = conv.stride, cast(tuple[int, ...], conv.padding)
        self.convolve: Convolve = partial(convolve, benchmark=benchmark)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.weight, self.bias, self.stride, self.padding)
