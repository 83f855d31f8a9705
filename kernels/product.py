"""The product of ``layer_norm_linear``, ``layer_norm_geglu`` and ``linear_add``: ``y = f(x W^T + z V^T)``.

One kernel walks over the inner axis and sums in float32. What follows the sum is applied to it before the only
rounding: LayerNorm (see ``layer_norm_linear``), bias, residual, and for GEGLU the gate, whose columns are a second sum
of the same rows. Columns come in one or two powers of two: SD v1.5's widths are multiples of 160 = 128 + 32 and of
80 = 64 + 16, which cut many of its layers into 128 tiles, for the 132 processors of a Hopper card.

On Hopper, tiles come through tensor descriptors (TMA) into the memory that its matrix instructions read, and one
program a processor takes tile after tile in one loop, so that the next tile is on its way while the last is finished.
The descriptors are made on the host for every launch, and are arguments by value: a CUDA graph keeps them with the
addresses that it replays on anyway, where descriptors made by the kernel would need memory from an allocator that
Triton has one of for all libraries. Elsewhere, tiles come through pointers and asynchronous copies.

A second input ``z`` advances in the same loop by a part of the step, so that both are through at about the same time.

Few rows leave processors idle, so the inner axis is split there: programs write sums of their parts, and a second
kernel adds these, always in the same order.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# (triton declares constexpr arguments as objects; launches pass plain numbers)

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .jit import cdiv, jit
from .product_tiles import Tile, best_tile, card_of

if TYPE_CHECKING:
    import triton.language as tl

_GROUP = 8  # row blocks whose tiles are next to one another in time, and find one another's columns in the cache
_BLOCK_SUM_M, _BLOCK_SUM_N = 8, 128


@dataclass(frozen=True, slots=True)
class Product:
    """What to compute.

    Attributes:
        x: (M, K) rows, contiguous, as all are.
        weight: (N, K); for GEGLU (2 N, K), values first.
        z, z_weight: a second input (M, K_z) and its weight (N, K_z).
        bias: of all rows of the weight.
        residual: (M, N).
        stats, sums: for LayerNorm, mean and inverse deviation (M, 2) of each row of x, and what was folded into the
            weight, see ``layer_norm_linear.fold``; float32.
        gated: whether to apply GEGLU.
    """

    x: Tensor
    weight: Tensor
    z: Tensor | None = None
    z_weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    stats: Tensor | None = None
    sums: Tensor | None = None
    gated: bool = False

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """M, N, K and K_z, which is 0 where there is no second input."""
        n_rows, K = self.weight.shape
        return len(self.x), n_rows // 2 if self.gated else n_rows, K, 0 if self.z is None else self.z.shape[1]


@jit
def _tile_of(
    source, first_row, first_k, n_rows, K,
    BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """(BLOCK_ROWS, BLOCK_K) of a matrix (n_rows, K): zeros beyond its columns; beyond its rows, anything finite."""
    if TMA:
        tile = source.load([first_row, first_k])
    else:
        offs = ((first_row + tl.arange(0, BLOCK_ROWS)) % n_rows).to(tl.int64)  # in place of a mask
        offs_k = first_k + tl.arange(0, BLOCK_K)
        at = source + offs[:, None] * K + offs_k[None, :]
        tile = tl.load(at) if EVEN_K else tl.load(at, mask=(offs_k < K)[None, :], other=0.0)
    return tile


@jit
def _finished(acc, offs_m, offs_n, M, n_rows, bias_ptr, stats_ptr, sums_ptr):
    """LayerNorm and bias, of a sum's rows and columns; ``offs_n`` are rows of the weight."""
    mask_m, mask_n = offs_m < M, offs_n < n_rows
    if sums_ptr is not None:
        mean = tl.load(stats_ptr + 2 * offs_m, mask=mask_m, other=0.0)
        rstd = tl.load(stats_ptr + 2 * offs_m + 1, mask=mask_m, other=0.0)
        total = tl.load(sums_ptr + offs_n, mask=mask_n, other=0.0)
        shift = tl.load(sums_ptr + n_rows + offs_n, mask=mask_n, other=0.0)
        rstd *= tl.load(sums_ptr + 2 * n_rows)  # and what the weight was scaled by
        acc = (acc - mean[:, None] * total[None, :]) * rstd[:, None] + shift[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    return acc


@jit
def _gated(value, gate):
    return value * 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))  # 1/sqrt(2)


@jit
def _store(acc, y_ptr, residual_ptr, offs_m, offs_n, M, N, stride):
    """Columns below N of rows that are ``stride`` apart."""
    at = offs_m[:, None] * stride + offs_n[None, :]
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _finish_gated(
    value, gate, offs_m, first_n, bias_ptr, stats_ptr, sums_ptr, y_ptr, M, N, BLOCK_N: tl.constexpr
):  # fmt: skip
    """GEGLU and what comes before it; a half at a time where columns are many, whose vectors would spill."""
    if BLOCK_N > 64:
        HALF: tl.constexpr = BLOCK_N // 2
        value, value_2 = tl.split(tl.permute(tl.reshape(value, [value.shape[0], 2, HALF]), [0, 2, 1]))
        gate, gate_2 = tl.split(tl.permute(tl.reshape(gate, [gate.shape[0], 2, HALF]), [0, 2, 1]))
        after = bias_ptr, stats_ptr, sums_ptr, y_ptr
        _finish_gated(value, gate, offs_m, first_n, *after, M, N, HALF)
        _finish_gated(value_2, gate_2, offs_m, first_n + HALF, *after, M, N, HALF)
    else:
        offs_n = first_n + tl.arange(0, BLOCK_N)
        value = _finished(value, offs_m, offs_n, M, 2 * N, bias_ptr, stats_ptr, sums_ptr)
        gate = _finished(gate, offs_m, offs_n + N, M, 2 * N, bias_ptr, stats_ptr, sums_ptr)
        _store(_gated(value, gate), y_ptr, None, offs_m, offs_n, M, N, N)


@jit
def _product_kernel(
    x, w, w_2, z, v, v_2, bias_ptr, residual_ptr, stats_ptr, sums_ptr, y_ptr, M, N, K, K_z, n_splits,
    GATED: tl.constexpr, PARTIAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_Z: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Operands are descriptors or pointers; ``w_2`` and ``v_2`` are those of the second columns."""
    WIDTH: tl.constexpr = BLOCK_N if GATED else BLOCK_N + BLOCK_N2
    SECOND: tl.constexpr = 0 if GATED else BLOCK_N  # where the second columns begin, from where w_2 begins
    n_rows = 2 * N if GATED else N
    tiles_m, tiles_n, steps = tl.cdiv(M, BLOCK_M), tl.cdiv(N, WIDTH), tl.cdiv(K, BLOCK_K)
    if z is not None:
        steps = tl.maximum(steps, tl.cdiv(K_z, BLOCK_Z))
    steps = tl.cdiv(steps, n_splits)
    n_tiles = tiles_m * tiles_n
    for tile in tl.range(tl.program_id(0), n_tiles * n_splits, tl.num_programs(0), flatten=TMA):
        place, split = tile % n_tiles, tile // n_tiles
        group = place // (GROUP * tiles_n)
        size = tl.minimum(tiles_m - group * GROUP, GROUP)
        within = place % (GROUP * tiles_n)
        first_m, first_n = (group * GROUP + within % size) * BLOCK_M, (within // size) * WIDTH
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if BLOCK_N2:
            acc_2 = tl.zeros([BLOCK_M, BLOCK_N2], tl.float32)
        for step in range(steps):
            first_k = (split * steps + step) * BLOCK_K
            a = _tile_of(x, first_m, first_k, M, K, BLOCK_M, BLOCK_K, TMA, EVEN_K)
            b = _tile_of(w, first_n, first_k, N, K, BLOCK_N, BLOCK_K, TMA, EVEN_K)
            acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
            if BLOCK_N2:
                b = _tile_of(w_2, first_n + SECOND, first_k, N, K, BLOCK_N2, BLOCK_K, TMA, EVEN_K)
                acc_2 = tl.dot(a, tl.trans(b), acc_2, input_precision=PRECISION)
            if z is not None:
                first_k = (split * steps + step) * BLOCK_Z
                a = _tile_of(z, first_m, first_k, M, K_z, BLOCK_M, BLOCK_Z, TMA, EVEN_K)
                b = _tile_of(v, first_n, first_k, N, K_z, BLOCK_N, BLOCK_Z, TMA, EVEN_K)
                acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
                if BLOCK_N2:
                    b = _tile_of(v_2, first_n + SECOND, first_k, N, K_z, BLOCK_N2, BLOCK_Z, TMA, EVEN_K)
                    acc_2 = tl.dot(a, tl.trans(b), acc_2, input_precision=PRECISION)
        offs_m = first_m.to(tl.int64) + tl.arange(0, BLOCK_M)
        if PARTIAL:
            rows_ptr = y_ptr + split.to(tl.int64) * M * n_rows
            _store(acc, rows_ptr, None, offs_m, first_n + tl.arange(0, BLOCK_N), M, N, n_rows)
            if BLOCK_N2:
                offs_n = first_n + SECOND + tl.arange(0, BLOCK_N2)
                _store(acc_2, rows_ptr + (N if GATED else 0), None, offs_m, offs_n, M, N, n_rows)
        elif GATED:
            _finish_gated(acc, acc_2, offs_m, first_n, bias_ptr, stats_ptr, sums_ptr, y_ptr, M, N, BLOCK_N)
        else:
            offs_n = first_n + tl.arange(0, BLOCK_N)
            acc = _finished(acc, offs_m, offs_n, M, N, bias_ptr, stats_ptr, sums_ptr)
            _store(acc, y_ptr, residual_ptr, offs_m, offs_n, M, N, N)
            if BLOCK_N2:
                offs_n = first_n + SECOND + tl.arange(0, BLOCK_N2)
                acc_2 = _finished(acc_2, offs_m, offs_n, M, N, bias_ptr, stats_ptr, sums_ptr)
                _store(acc_2, y_ptr, residual_ptr, offs_m, offs_n, M, N, N)


@jit
def _product_sum_kernel(
    partial_ptr, bias_ptr, residual_ptr, stats_ptr, sums_ptr, y_ptr, M, N, n_splits,
    GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The parts' sums (n_splits, M, rows of the weight), in their order, and what follows."""
    n_rows = 2 * N if GATED else N
    offs_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    partial_ptr += offs_m[:, None] * n_rows + offs_n[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if GATED:
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(n_splits):
        acc += tl.load(partial_ptr, mask=mask, other=0.0)
        if GATED:
            gate += tl.load(partial_ptr + N, mask=mask, other=0.0)
        partial_ptr += tl.cast(M, tl.int64) * n_rows
    acc = _finished(acc, offs_m, offs_n, M, n_rows, bias_ptr, stats_ptr, sums_ptr)
    if GATED:
        acc = _gated(acc, _finished(gate, offs_m, offs_n + N, M, n_rows, bias_ptr, stats_ptr, sums_ptr))
    _store(acc, y_ptr, residual_ptr, offs_m, offs_n, M, N, N)


def precision(dtype: torch.dtype) -> str:
    """How products are formed; nothing but float32 has a choice."""
    return "ieee" if dtype == torch.float32 else "tf32"


def check_products(**inputs: Tensor | None) -> None:
    """Refuse tensors the kernels of products cannot walk."""
    for name, x in inputs.items():
        if x is not None and not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got {tuple(x.shape)}, strides {x.stride()}")


def multiply(product: Product, y: Tensor, tma: bool = True, tile: Tile | None = None) -> Tensor:
    """Launch the kernels.

    Args:
        product: what to compute, not of size 0.
        y: (M, N) contiguous, where the result goes; of the dtype of ``x``.
        tma: whether descriptors may be used, where the card and the sizes allow it.
        tile: how to walk; the fastest by ``best_tile`` unless given.

    Returns:
        ``y``.
    """
    x, (M, N, K, K_z) = product.x, product.sizes
    if tile is None:
        operands = [one for one in (x, product.weight, product.z, product.z_weight) if one is not None]
        described = tma and all(one.shape[1] * one.itemsize % 16 == one.data_ptr() % 16 == 0 for one in operands)
        tile = best_tile(M, N, K, K_z, x.dtype, product.gated, card_of(x.device), described)
    target = y if tile.splits == 1 else x.new_empty(tile.splits, M, len(product.weight), dtype=torch.float32)
    arguments, constants = launch_arguments(product, target, tile)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _product_kernel[(tile.n_programs(M, N, product.gated),)](*arguments, **constants)
        if tile.splits > 1:
            _product_sum_kernel[(cdiv(N, _BLOCK_SUM_N), cdiv(M, _BLOCK_SUM_M))](
                target, product.bias, product.residual, product.stats, product.sums, y, M, N, tile.splits,
                GATED=product.gated, BLOCK_M=_BLOCK_SUM_M, BLOCK_N=_BLOCK_SUM_N,
            )  # fmt: skip
    return y


def launch_arguments(product: Product, target: Tensor, tile: Tile) -> tuple[list[Any], dict[str, Any]]:
    """What ``_product_kernel`` is launched with: its arguments in order, its constants and options by name."""
    M, N, K, K_z = product.sizes
    block_z, is_whole = tile.block_z(K, K_z), tile.splits == 1
    after = (product.bias, product.residual, product.stats, product.sums) if is_whole else (None,) * 4
    arguments = [*_operands(product, tile, block_z), *after, target, M, N, K, K_z, tile.splits]
    constants = {"GATED": product.gated, "PARTIAL": not is_whole, "BLOCK_Z": block_z, "GROUP": _GROUP}
    constants |= {"EVEN_K": tile.is_even(K, K_z), "PRECISION": precision(product.x.dtype)}
    return arguments, constants | tile.constants()


def _operands(product: Product, tile: Tile, block_z: int) -> list[Any]:
    """The kernel's first six arguments."""
    found: list[Any] = []
    for x, weight, block_k in ((product.x, product.weight, tile.block_k), (product.z, product.z_weight, block_z)):
        if x is None or weight is None:
            found += [None] * 3
            continue
        first, second = weight.chunk(2) if product.gated else (weight, weight)
        if not tile.tma:
            found += [x, first, second if tile.block_n2 else None]
            continue
        blocks = ((x, tile.block_m), (first, tile.block_n), (second, tile.block_n2))
        found += [_described(one, rows, block_k) if rows else None for one, rows in blocks]
    return found


def _described(x: Tensor, block_rows: int, block_k: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [block_rows, block_k])
