"""``y = silu(group_norm(x + s))`` (Wu and He 2018, arXiv:1803.08494; Elfwing et al. 2017, arXiv:1702.03118).

The shift ``s`` is one number a channel, or one a row and channel: a convolution's bias, and the time embedding's. It
moves a channel's mean and nothing else, so that adding it costs no pass over memory.

The kernels read channels-last memory, where a group is a few neighbouring channels at every position. There are two
ways, and calibration times both. In one launch, a program has a group of a row to itself: it holds what fits into its
registers, and reads longer pictures again, from a cache. In two, programs share a group's positions: the first launch
leaves a mean and a sum of squared deviations for each chunk of positions and group, and every program of the second
combines those of its groups, which are few, before it applies them. That fills a card when groups are long, and needs
neither a counter nor a wait between programs.

Means and deviations are exact within a block, and blocks are combined by the parallel variance formula (Chan, Golub and
LeVeque 1979), in a fixed order. The mean is subtracted before scaling: folding it into an offset would cancel large
means inexactly.
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

_POSITIONS = 1024  # of a block, at most: sums of more would be long, and less exact
_HELD = 1 << 14  # values that a program which has a group to itself has in registers at a time, padding included
_SHARED = 1 << 13  # the same of one that shares groups; smaller, so that a processor has room for several
_NEIGHBOURS = 128  # channels of neighbouring groups that a program takes, where groups are shared: whole sectors
_CHUNKS, _MOST_CHUNKS = 64, 256  # of positions: every program of the second launch reads the statistics of all
_SHARED_FROM = 2048  # positions, from which on two launches serve if nothing was measured

torch.library.define(
    "twinstream::group_norm", "(Tensor x, Tensor weight, Tensor bias, int groups, float eps, int launches=0) -> Tensor"
)
torch.library.define(
    "twinstream::group_norm_silu",
    "(Tensor x, Tensor? shift, Tensor weight, Tensor bias, int groups, float eps, int launches=0) -> Tensor",
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
def _channels(pid_g, GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr):
    """Channels (GROUPS, BLOCK_G) of neighbouring groups."""
    return (pid_g * GROUPS + tl.arange(0, GROUPS))[:, None] * GROUP + tl.arange(0, BLOCK_G)[None, :]


@jit
def _parameters(
    shift_ptr, weight_ptr, bias_ptr, pid_g, pid_b, C, n_shifted, stride_shift,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Shift, weight and bias of some groups' channels, float32, and which of them there are."""
    offs_c = _channels(pid_g, GROUP, GROUPS, BLOCK_G)
    there = (tl.arange(0, BLOCK_G) < GROUP)[None, :] & (offs_c < C)
    shifted = there & (offs_c < n_shifted)
    shift = tl.load(shift_ptr + pid_b * stride_shift + offs_c, mask=shifted, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + offs_c, mask=there, other=0.0).to(tl.float32)
    return shift, weight, tl.load(bias_ptr + offs_c, mask=there, other=0.0).to(tl.float32), there


@jit
def _read(x_ptr, offs_c, there_c, shift, first, end, C, BLOCK_N: tl.constexpr):
    """Positions from ``first`` to below ``end`` of channels (GROUPS, BLOCK_G), shifted, float32; and what is there."""
    offs_n = tl.arange(0, BLOCK_N)
    there = (offs_n < end - first)[:, None, None] & there_c[None, :, :]
    at = x_ptr + tl.cast(first, tl.int64) * C + (offs_n[:, None, None] * C + offs_c[None, :, :])
    return tl.load(at, mask=there, other=0.0).to(tl.float32) + shift[None, :, :], there


@jit
def _moments(x, there, count):
    """Mean and sum of squared deviations (GROUPS,) of ``count`` values a group.

    A sum of values around a large mean is inexact; one of the deviations from what it gives is not.
    """
    near = tl.sum(tl.sum(tl.where(there, x, 0.0), axis=0), axis=1) / count
    deviation = tl.where(there, x - near[None, :, None], 0.0)
    rest = tl.sum(tl.sum(deviation, axis=0), axis=1) / count
    m2 = tl.sum(tl.sum(deviation * deviation, axis=0), axis=1) - count * rest * rest
    return near + rest, tl.maximum(m2, 0.0)


@jit
def _moments_of_blocks(
    x_ptr, offs_c, there_c, shift, first, end, C,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same of all positions from ``first`` to below ``end``."""
    mean, m2 = tl.zeros([GROUPS], tl.float32), tl.zeros([GROUPS], tl.float32)
    for n in range(first, end, BLOCK_N):
        x, there = _read(x_ptr, offs_c, there_c, shift, n, end, C, BLOCK_N)
        before, count = (n - first) * (1.0 * GROUP), tl.minimum(BLOCK_N, end - n) * (1.0 * GROUP)
        mean_here, m2_here = _moments(x, there, count)
        distance, share = mean_here - mean, count / (before + count)
        mean += distance * share
        m2 += m2_here + distance * distance * (before * share)
    return mean, m2


@jit
def _write(y_ptr, offs_c, x, there, mean, scale, bias, first, C, silu, BLOCK_N: tl.constexpr):
    y = (x - mean[None, :, None]) * scale[None, :, :] + bias[None, :, :]
    if silu > 0.0:
        root = tl.rsqrt(1.0 + tl.exp2(y * -1.4426950408889634))  # its square is the sigmoid; a division takes longer
        y = y * root * root
    at = y_ptr + tl.cast(first, tl.int64) * C + (tl.arange(0, BLOCK_N)[:, None, None] * C + offs_c[None, :, :])
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=there)


@jit
def _group_norm_kernel(
    x_ptr, shift_ptr, weight_ptr, bias_ptr, y_ptr, N, C, n_shifted, stride_shift, eps, silu,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_HELD: tl.constexpr,
):  # fmt: skip
    pid_g, pid_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    shift, weight, bias, there_c = _parameters(
        shift_ptr, weight_ptr, bias_ptr, pid_g, pid_b, C, n_shifted, stride_shift, GROUP, 1, BLOCK_G
    )
    offs_c = _channels(pid_g, GROUP, 1, BLOCK_G)
    x_ptr += pid_b * N * C
    y_ptr += pid_b * N * C
    if IS_HELD:
        x, there = _read(x_ptr, offs_c, there_c, shift, 0, N, C, BLOCK_N)
        mean, m2 = _moments(x, there, N * (1.0 * GROUP))
        scale = tl.rsqrt(m2 / (N * (1.0 * GROUP)) + eps)[:, None] * weight
        _write(y_ptr, offs_c, x, there, mean, scale, bias, 0, C, silu, BLOCK_N)
    else:
        mean, m2 = _moments_of_blocks(x_ptr, offs_c, there_c, shift, 0, N, C, GROUP, 1, BLOCK_N)
        scale = tl.rsqrt(m2 / (N * (1.0 * GROUP)) + eps)[:, None] * weight
        for n in range(0, N, BLOCK_N):
            x, there = _read(x_ptr, offs_c, there_c, shift, n, N, C, BLOCK_N)
            _write(y_ptr, offs_c, x, there, mean, scale, bias, n, C, silu, BLOCK_N)


@jit
def _group_norm_stats_kernel(
    x_ptr, shift_ptr, mean_ptr, m2_ptr, N, C, n_shifted, stride_shift, chunk,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid_n, pid_g, pid_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    shift, _, _, there_c = _parameters(
        shift_ptr, x_ptr, x_ptr, pid_g, pid_b, C, n_shifted, stride_shift, GROUP, GROUPS, BLOCK_G
    )
    offs_c = _channels(pid_g, GROUP, GROUPS, BLOCK_G)
    x_ptr += pid_b * N * C
    end = tl.minimum(pid_n * chunk + chunk, N)
    mean, m2 = _moments_of_blocks(x_ptr, offs_c, there_c, shift, pid_n * chunk, end, C, GROUP, GROUPS, BLOCK_N)
    n_groups = C // GROUP
    offs_g = pid_g * GROUPS + tl.arange(0, GROUPS)
    at = (pid_b * n_groups + offs_g) * tl.num_programs(0) + pid_n
    tl.store(mean_ptr + at, mean, mask=offs_g < n_groups)
    tl.store(m2_ptr + at, m2, mask=offs_g < n_groups)


@jit
def _group_norm_apply_kernel(
    x_ptr, shift_ptr, mean_ptr, m2_ptr, weight_ptr, bias_ptr, y_ptr, N, C, n_shifted, stride_shift, chunk, eps, silu,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):  # fmt: skip
    pid_n, pid_g, pid_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n_groups, n_chunks = C // GROUP, tl.num_programs(0)
    offs_g, chunks = pid_g * GROUPS + tl.arange(0, GROUPS), tl.arange(0, BLOCK_CHUNKS)
    at = ((pid_b * n_groups + offs_g) * n_chunks)[:, None] + chunks[None, :]
    mask_g = offs_g < n_groups
    mask = mask_g[:, None] & (chunks < n_chunks)[None, :]
    counts = tl.where(mask, (tl.minimum(chunk, N - chunks * chunk) * (1.0 * GROUP))[None, :], 0.0)
    first = tl.load(mean_ptr + (pid_b * n_groups + offs_g) * n_chunks, mask=mask_g, other=0.0)
    means = tl.load(mean_ptr + at, mask=mask, other=0.0)
    distances = (means - first[:, None]) * counts  # beside one of them, should they be large
    mean = first + tl.sum(distances, axis=1) / (N * (1.0 * GROUP))
    distances = means - mean[:, None]
    m2 = tl.sum(tl.load(m2_ptr + at, mask=mask, other=0.0) + distances * distances * counts, axis=1)
    shift, weight, bias, there_c = _parameters(
        shift_ptr, weight_ptr, bias_ptr, pid_g, pid_b, C, n_shifted, stride_shift, GROUP, GROUPS, BLOCK_G
    )
    scale = tl.rsqrt(m2 / (N * (1.0 * GROUP)) + eps)[:, None] * weight
    offs_c = _channels(pid_g, GROUP, GROUPS, BLOCK_G)
    x_ptr += pid_b * N * C
    y_ptr += pid_b * N * C
    end = tl.minimum(pid_n * chunk + chunk, N)
    for n in range(pid_n * chunk, end, BLOCK_N):
        x, there = _read(x_ptr, offs_c, there_c, shift, n, end, C, BLOCK_N)
        _write(y_ptr, offs_c, x, there, mean, scale, bias, n, C, silu, BLOCK_N)


def group_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, launches: int = 0) -> Tensor:
    """Launch the kernels on a channels-last ``x`` (B, C, h, w); the result is channels-last.

    In one launch or two; with 0, in as many as suit the size where nothing was measured.
    """
    return _launch(x, None, weight, bias, groups, eps, launches, silu=False)


def group_norm_silu_triton(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, launches: int = 0
) -> Tensor:
    """The same with shift and SiLU."""
    return _launch(x, shift, weight, bias, groups, eps, launches, silu=True)


def launches_for(positions: int) -> int:
    """How many launches serve where nothing was measured."""
    return 1 if positions < _SHARED_FROM else 2


def alone_tile(N: int, group: int) -> dict[str, int | bool]:
    """Constants of the one launch, for so many positions, and channels a group."""
    block_g = next_power_of_2(group)
    block_n = max(1, min(_POSITIONS, _HELD // block_g, next_power_of_2(N)))
    n_warps = max(1, min(16, block_n * block_g >> 9))
    return {"GROUP": group, "BLOCK_G": block_g, "BLOCK_N": block_n, "IS_HELD": block_n >= N, "num_warps": n_warps}


def shared_tile(N: int, group: int, groups: int) -> dict[str, int]:
    """Constants of both of two launches; a program takes one block of positions or more of them."""
    block_g = next_power_of_2(group)
    together = max(1, min(_NEIGHBOURS // block_g, next_power_of_2(groups)))
    block_n = max(1, min(_POSITIONS, _SHARED // (together * block_g), next_power_of_2(N)))
    return {"GROUP": group, "GROUPS": together, "BLOCK_G": block_g, "BLOCK_N": block_n, "num_warps": 8}


def chunks_of(N: int, block_n: int) -> tuple[int, int]:
    """The positions of a chunk, and how many chunks there are."""
    chunk = block_n * cdiv(cdiv(N, block_n), _MOST_CHUNKS)
    return chunk, cdiv(N, chunk)


def _launch(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, launches: int, *, silu: bool
) -> Tensor:
    B, C, height, width = x.shape
    if not x.is_contiguous(memory_format=torch.channels_last) or C % groups:
        rule = f"x must be channels-last with channels in {groups} groups"
        raise ValueError(f"{rule}, got {tuple(x.shape)}, strides {x.stride()}")
    if shift is not None and (shift.shape not in {(1, C), (B, C)} or shift.stride(1) != 1):
        rule = f"shift must be (1 or {B}, {C}), its channels side by side"
        raise ValueError(f"{rule}, got {tuple(shift.shape)}, strides {shift.stride()}")
    if launches not in (0, 1, 2):
        raise ValueError(f"launches must be 1 or 2, or 0 for what suits the size, got {launches}")
    y = torch.empty_like(x, memory_format=torch.channels_last)
    if not y.numel():
        return y
    N, group = height * width, C // groups
    shift_here, n_shifted = (x, 0) if shift is None else (shift, C)
    shifted = n_shifted, shift_here.stride(0) if len(shift_here) > 1 and n_shifted else 0
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if (launches or launches_for(N)) == 1:
            tile = alone_tile(N, group)
            _group_norm_kernel[(groups, B)](
                x, shift_here, weight, bias, y, N, C, *shifted, eps, float(silu), **tile
            )  # fmt: skip
            return y
        tile = shared_tile(N, group, groups)
        chunk, n_chunks = chunks_of(N, tile["BLOCK_N"])
        mean, m2 = x.new_empty(2, B, groups, n_chunks, dtype=torch.float32).unbind(0)
        grid = (n_chunks, cdiv(groups, tile["GROUPS"]), B)
        _group_norm_stats_kernel[grid](x, shift_here, mean, m2, N, C, *shifted, chunk, **tile)
        _group_norm_apply_kernel[grid](
            x, shift_here, mean, m2, weight, bias, y, N, C, *shifted, chunk, eps, float(silu),
            BLOCK_CHUNKS=max(_CHUNKS, next_power_of_2(n_chunks)), **tile,
        )  # fmt: skip
    return y


def _group_norm_on_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    launches: int = 0,  # noqa: ARG001
) -> Tensor:
    return group_norm_ref(x, weight, bias, groups, eps)


def _group_norm_silu_on_cpu(
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    launches: int = 0,  # noqa: ARG001
) -> Tensor:
    return group_norm_silu_ref(x, shift, weight, bias, groups, eps)


torch.library.impl("twinstream::group_norm", "cuda", group_norm_triton)
torch.library.impl("twinstream::group_norm", "cpu", _group_norm_on_cpu)
torch.library.impl("twinstream::group_norm_silu", "cuda", group_norm_silu_triton)
torch.library.impl("twinstream::group_norm_silu", "cpu", _group_norm_silu_on_cpu)


@torch.library.register_fake("twinstream::group_norm")
def _group_norm_fake(x: Tensor, *_arguments: Tensor | float) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("twinstream::group_norm_silu")
def _group_norm_silu_fake(x: Tensor, *_arguments: Tensor | float | None) -> Tensor:
    return torch.empty_like(x)


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, launches: int = 0) -> Tensor:
    """GroupNorm through the dispatcher: Triton on CUDA tensors, the reference on CPU tensors. No gradient."""
    return torch.ops.twinstream.group_norm(x, weight, bias, groups, eps, launches)


def group_norm_silu(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, launches: int = 0
) -> Tensor:
    """The same with shift and SiLU."""
    return torch.ops.twinstream.group_norm_silu(x, shift, weight, bias, groups, eps, launches)
