"""What ends a residual block: ``y = x + r + b`` for a convolution's output, the residual, and the convolution's bias.

cuDNN adds a bias in a pass of its own, so the convolution runs without and both sums are one pass over memory.
"""

# pyright: reportArgumentType=false
# (triton declares constexpr arguments as objects; launches pass plain numbers)

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .jit import cdiv, jit

if TYPE_CHECKING:
    import triton.language as tl

_BLOCK = 1024

torch.library.define("twinstream::residual_add", "(Tensor x, Tensor residual, Tensor bias) -> Tensor")


def residual_add_ref(x: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
    """Eager sum of ``x`` and ``residual`` (B, C, h, w) and ``bias`` (C,), of one dtype."""
    return x + bias[:, None, None] + residual


@jit
def _residual_add_fwd_kernel(x_ptr, residual_ptr, bias_ptr, y_ptr, n_values, C, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n_values
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs % C, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, (x + residual + bias).to(y_ptr.dtype.element_ty), mask=mask)


def residual_add_triton(x: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
    """Launch the kernel on channels-last tensors; the result is channels-last."""
    for name, given in {"x": x, "residual": residual}.items():
        if not given.is_contiguous(memory_format=torch.channels_last) or given.shape != x.shape:
            rule = f"{name} must be channels-last {tuple(x.shape)}"
            raise ValueError(f"{rule}, got {tuple(given.shape)}, strides {given.stride()}")
    y = torch.empty_like(x, memory_format=torch.channels_last)
    if y.numel():
        with torch.cuda.device_of(x):  # Triton launches on the current device
            _residual_add_fwd_kernel[(cdiv(y.numel(), _BLOCK),)](
                x, residual, bias, y, y.numel(), x.shape[1], BLOCK=_BLOCK
            )
    return y


torch.library.impl("twinstream::residual_add", "cuda", residual_add_triton)
torch.library.impl("twinstream::residual_add", "cpu", residual_add_ref)


@torch.library.register_fake("twinstream::residual_add")
def _residual_add_fake(x: Tensor, residual: Tensor, bias: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x)


def residual_add(x: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
    """Through the dispatcher: Triton on CUDA tensors, the reference on CPU tensors. No gradient."""
    return torch.ops.twinstream.residual_add(x, residual, bias)
