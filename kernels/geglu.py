"""GEGLU: ``y = v * gelu(g)`` with ``[v | g] = x`` (Shazeer 2020, arXiv:2002.05202).

The kernel forms the product in float32 and rounds once.
"""

# pyright: reportArgumentType=false
# (triton declares constexpr arguments as objects; launches pass plain numbers)

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .jit import cdiv, jit

if TYPE_CHECKING:
    import triton.language as tl

_BLOCK = 1024

torch.library.define("twinstream::geglu", "(Tensor x) -> Tensor")


def geglu_ref(x: Tensor) -> Tensor:
    """Eager GEGLU of ``x`` (..., 2C) into (..., C), with the exact (erf) gelu."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


@jit
def _geglu_fwd_kernel(x_ptr, y_ptr, n_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # row * n_cols overflows int32 on large batches
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n_cols
    value = tl.load(x_ptr + row * 2 * n_cols + cols, mask=mask).to(tl.float32)
    gate = tl.load(x_ptr + row * 2 * n_cols + n_cols + cols, mask=mask).to(tl.float32)
    y = value * 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))  # 1/sqrt(2)
    tl.store(y_ptr + row * n_cols + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


def geglu_triton(x: Tensor) -> Tensor:
    """Launch the kernel on a contiguous ``x`` (..., 2C)."""
    if not x.is_contiguous() or x.shape[-1] % 2:
        raise ValueError(f"x must be contiguous with an even last axis, got {tuple(x.shape)}, strides {x.stride()}")
    y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    n_cols = y.shape[-1]
    if y.numel():
        with torch.cuda.device_of(x):  # Triton launches on the current device
            _geglu_fwd_kernel[(y.numel() // n_cols, cdiv(n_cols, _BLOCK))](x, y, n_cols, BLOCK=_BLOCK)
    return y


torch.library.impl("twinstream::geglu", "cuda", geglu_triton)
torch.library.impl("twinstream::geglu", "cpu", geglu_ref)


@torch.library.register_fake("twinstream::geglu")
def _geglu_fake(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def geglu(x: Tensor) -> Tensor:
    """GEGLU through the dispatcher: Triton on CUDA tensors, the reference on CPU tensors. No gradient."""
    return torch.ops.twinstream.geglu(x)
