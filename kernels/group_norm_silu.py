"""``y = silu(group_norm(x + s))`` (Wu and He 2018, arXiv:1803.08494; Elfwing et al. 2017, arXiv:1702.03118).

The shift ``s`` is one number a channel, or one a row and channel: a convolution's bias, and the time embedding's. It
moves a channel's mean and nothing else, so that adding it costs no pass over memory.

The kernels read channels-last memory, where a group is a few neighbouring channels at every position. One program a
group would leave most of a GPU idle, so statistics are taken in three launches: per channel over chunks of positions
(mean and sum of squared deviations, both exact within the chunk), combined over chunks and channels by the parallel
variance formula (Chan, Golub and LeVeque 1979) into a centre and a scale per row and channel, and applied. The centre
is subtracted before scaling: folding it into an offset would cancel large means inexactly.
"""

# pyright: reportArgumentType=false
# (triton declares constexpr arguments as objects; launches pass plain numbers)

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .jit import cdiv, jit, next_power_of_2

if TYPE_CHECKING:
    import triton.language as tl

_BLOCK_N, _BLOCK_C = 64, 64
_COMBINED = 1024  # statistics combined at a time: many chunks of few channels; more of them spill

torch.library.define(
    "twinstream::group_norm", "(Tensor x, Tensor weight, Tensor bias, int groups, float eps) -> Tensor"
)
torch.library.define(
    "twinstream::group_norm_silu",
    "(Tensor x, Tensor? shift, Tensor weight, Tensor bias, int groups, float eps) -> Tensor",
)


def group_norm_ref(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Eager GroupNorm of ``x`` (B, C, h, w) in its own memory format; ``weight`` and ``bias`` are (C,).

    The statistics are always taken on contiguous memory: for channels-last tensors PyTorch's CPU kernel forms the
    variance as ``E[x^2] - E[x]^2`` and errs 30 to 100 times as much (2.13.0).
    """
    y = F.group_norm(x.contiguous(), groups, weight, bias, eps)
    return y if x.is_contiguous() else y.contiguous(memory_format=torch.channels_last)


def group_norm_silu_ref(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> Tensor:
    """Eager ``silu(group_norm_ref(x + shift, ...))``; ``shift`` is (1, C) or (B, C), None for zeros."""
    x = x if shift is None else x + shift[:, :, None, None]
    return F.silu(group_norm_ref(x, weight, bias, groups, eps))


@jit
def _group_norm_stats_kernel(x_ptr, mean_ptr, m2_ptr, N, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    pid_n, pid_b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_n, mask_c = offs_n < N, offs_c < C
    mask = mask_n[:, None] & mask_c[None, :]
    x = tl.load(x_ptr + (pid_b * N + offs_n)[:, None] * C + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
    count = tl.minimum(BLOCK_N, N - pid_n * BLOCK_N)
    mean = tl.sum(x, axis=0) / count
    deviation = tl.where(mask, x - mean[None, :], 0.0)
    at = (pid_b * tl.num_programs(0) + pid_n) * C + offs_c
    tl.store(mean_ptr + at, mean, mask=mask_c)
    tl.store(m2_ptr + at, tl.sum(deviation * deviation, axis=0), mask=mask_c)


@jit
def _group_norm_combine_kernel(
    mean_ptr, m2_ptr, shift_ptr, weight_ptr, centre_ptr, scale_ptr, N, C, n_chunks, stride_shift, eps,
    HAS_SHIFT: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):  # fmt: skip
    pid_g, pid_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    in_group = tl.arange(0, BLOCK_G)
    offs_c = pid_g * GROUP + in_group
    mask_c = in_group < GROUP
    shift = tl.zeros([BLOCK_G], tl.float32)
    if HAS_SHIFT:
        shift += tl.load(shift_ptr + pid_b * stride_shift + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    near = tl.load(mean_ptr + pid_b * n_chunks * C + pid_g * GROUP)  # what sums are taken beside, should it be large
    total = tl.zeros([BLOCK_CHUNKS, BLOCK_G], tl.float32)
    for first in range(0, n_chunks, BLOCK_CHUNKS):
        chunk = first + tl.arange(0, BLOCK_CHUNKS)
        mask = (chunk < n_chunks)[:, None] & mask_c[None, :]
        count = tl.minimum(BLOCK_N, N - chunk * BLOCK_N).to(tl.float32)
        at = (pid_b * n_chunks + chunk)[:, None] * C + offs_c[None, :]
        distance = tl.load(mean_ptr + at, mask=mask, other=0.0) + shift[None, :] - near
        total += tl.where(mask, distance, 0.0) * count[:, None]
    mean = near + tl.sum(tl.sum(total, axis=1), axis=0) / (N * GROUP)
    spread = tl.zeros([BLOCK_CHUNKS, BLOCK_G], tl.float32)
    for first in range(0, n_chunks, BLOCK_CHUNKS):
        chunk = first + tl.arange(0, BLOCK_CHUNKS)
        mask = (chunk < n_chunks)[:, None] & mask_c[None, :]
        count = tl.minimum(BLOCK_N, N - chunk * BLOCK_N).to(tl.float32)
        at = (pid_b * n_chunks + chunk)[:, None] * C + offs_c[None, :]
        distance = tl.where(mask, tl.load(mean_ptr + at, mask=mask, other=0.0) + shift[None, :] - mean, 0.0)
        spread += tl.load(m2_ptr + at, mask=mask, other=0.0) + count[:, None] * distance * distance
    variance = tl.sum(tl.sum(spread, axis=1), axis=0) / (N * GROUP)
    scale = tl.rsqrt(variance + eps) * tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    tl.store(scale_ptr + pid_b * C + offs_c, scale, mask=mask_c)
    tl.store(centre_ptr + pid_b * C + offs_c, tl.zeros([BLOCK_G], tl.float32) + mean, mask=mask_c)


@jit
def _group_norm_apply_kernel(
    x_ptr, shift_ptr, centre_ptr, scale_ptr, bias_ptr, y_ptr, N, C, stride_shift,
    HAS_SHIFT: tl.constexpr, SILU: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid_b = tl.program_id(2).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = (offs_n < N)[:, None] & mask_c[None, :]
    at = (pid_b * N + offs_n)[:, None] * C + offs_c[None, :]
    scale = tl.load(scale_ptr + pid_b * C + offs_c, mask=mask_c, other=0.0)
    centre = tl.load(centre_ptr + pid_b * C + offs_c, mask=mask_c, other=0.0)
    bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        x += tl.load(shift_ptr + pid_b * stride_shift + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    y = (x - centre[None, :]) * scale[None, :] + bias[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


def group_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Launch the kernels on a channels-last ``x`` (B, C, h, w); the result is channels-last."""
    return _launch(x, None, weight, bias, groups, eps, silu=False)


def group_norm_silu_triton(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> Tensor:
    """The same with shift and SiLU."""
    return _launch(x, shift, weight, bias, groups, eps, silu=True)


def group_tile(group: int) -> dict[str, int]:
    """Constants by which statistics of groups of so many channels are combined."""
    block_g = next_power_of_2(group)
    return {"GROUP": group, "BLOCK_G": block_g, "BLOCK_CHUNKS": max(1, _COMBINED // block_g)}


def _launch(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, *, silu: bool
) -> Tensor:
    B, C, height, width = x.shape
    if not x.is_contiguous(memory_format=torch.channels_last) or C % groups:
        rule = f"x must be channels-last with channels in {groups} groups"
        raise ValueError(f"{rule}, got {tuple(x.shape)}, strides {x.stride()}")
    if shift is not None and (shift.shape not in {(1, C), (B, C)} or shift.stride(1) != 1):
        rule = f"shift must be (1 or {B}, {C}), its channels side by side"
        raise ValueError(f"{rule}, got {tuple(shift.shape)}, strides {shift.stride()}")
    y = torch.empty_like(x, memory_format=torch.channels_last)
    if not y.numel():
        return y
    N, group = height * width, C // groups
    n_chunks = cdiv(N, _BLOCK_N)
    mean, m2 = x.new_empty(2, B, n_chunks, C, dtype=torch.float32).unbind(0)
    centre, scale = x.new_empty(2, B, C, dtype=torch.float32).unbind(0)
    stride_shift = shift.stride(0) if shift is not None and len(shift) > 1 else 0
    tiles = (n_chunks, cdiv(C, _BLOCK_C), B)
    shift_here, has_shift = x if shift is None else shift, shift is not None
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _group_norm_stats_kernel[tiles](x, mean, m2, N, C, BLOCK_N=_BLOCK_N, BLOCK_C=_BLOCK_C)
        _group_norm_combine_kernel[(groups, B)](
            mean, m2, shift_here, weight, centre, scale, N, C, n_chunks, stride_shift, eps, HAS_SHIFT=has_shift,
            BLOCK_N=_BLOCK_N, **group_tile(group),
        )  # fmt: skip
        _group_norm_apply_kernel[tiles](
            x, shift_here, centre, scale, bias, y, N, C, stride_shift,
            HAS_SHIFT=has_shift, SILU=silu, BLOCK_N=_BLOCK_N, BLOCK_C=_BLOCK_C,
        )  # fmt: skip
    return y


torch.library.impl("twinstream::group_norm", "cuda", group_norm_triton)
torch.library.impl("twinstream::group_norm", "cpu", group_norm_ref)
torch.library.impl("twinstream::group_norm_silu", "cuda", group_norm_silu_triton)
torch.library.impl("twinstream::group_norm_silu", "cpu", group_norm_silu_ref)


@torch.library.register_fake("twinstream::group_norm")
def _group_norm_fake(x: Tensor, *_arguments: Tensor | float) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("twinstream::group_norm_silu")
def _group_norm_silu_fake(x: Tensor, *_arguments: Tensor | float | None) -> Tensor:
    return torch.empty_like(x)


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """GroupNorm through the dispatcher: Triton on CUDA tensors, the reference on CPU tensors. No gradient."""
    return torch.ops.twinstream.group_norm(x, weight, bias, groups, eps)


def group_norm_silu(x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """The same with shift and SiLU."""
    return torch.ops.twinstream.group_norm_silu(x, shift, weight, bias, groups, eps)
