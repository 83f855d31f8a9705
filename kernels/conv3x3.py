"""A 3x3 convolution of stride 1: ``y[o, i, j] = b[o] + sum_cuv w[o, c, u, v] x[c, i + u - 1, j + v - 1]``.

What lies outside is zero. GPUs run cuDNN's through PyTorch; CPUs have one by minimal filtering (``csrc/winograd.h``).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def conv3x3_ref(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Eager convolution of ``x`` (B, C, h, w) with ``weight`` (O, C, 3, 3), to (B, O, h, w)."""
    return F.conv2d(x, weight, bias, padding=1)
