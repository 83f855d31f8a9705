"""Single ops at SD v1.5's sizes, for benchmarks: their arguments and their work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.backends.ops import Ops
from engine.kernels.attention import attention_triton
from engine.kernels.conv3x3 import conv3x3_ref
from engine.kernels.cross_attention import cross_attention_triton
from engine.kernels.dbim import dbim_triton
from engine.kernels.group_norm_silu import group_norm_silu_triton, group_norm_triton
from engine.kernels.layer_norm_geglu import layer_norm_geglu_triton
from engine.kernels.layer_norm_linear import layer_norm_linear_triton
from engine.kernels.linear_add import linear_add_triton
from engine.kernels.residual_add import residual_add_triton
from engine.kernels.residual_apply import residual_apply_triton

ROWS = 2
_TEXT, _HEADS, _GATES = 77, 8, (1.0, 10.0, 10.0, 500.0)
_SIZES = ((4096, 320), (1024, 640), (256, 1280))  # positions and channels of a stage

KERNELS = Ops(  # every Triton kernel, whether or not it is chosen
    name="kernels",
    attention=attention_triton,
    cross_attention=cross_attention_triton,
    residual_apply=residual_apply_triton,
    dbim=dbim_triton,
    group_norm=group_norm_triton,
    group_norm_silu=group_norm_silu_triton,
    conv3x3=conv3x3_ref,
    residual_add=residual_add_triton,
    layer_norm_linear=layer_norm_linear_triton,
    layer_norm_geglu=layer_norm_geglu_triton,
    linear_add=linear_add_triton,
)


@dataclass(frozen=True, slots=True)
class Op:
    """A call of ``Ops.name``: its arguments for a dtype, and its work in FLOPs, or in values moved.

    ``sizes`` are its head dim, or channels.
    """

    name: str
    arguments: Callable[[torch.dtype], list[Any]]
    sizes: tuple[int, ...]
    flops: float = 0.0
    values: float = 0.0

    def work(self, dtype: torch.dtype) -> dict[str, float]:
        """As records give it."""
        return {"flops": self.flops} if self.flops else {"bytes": self.values * dtype.itemsize}


def random(*shape: int) -> Tensor:
    """Normal numbers, the same for the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Of the whole tensor, in float64."""
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


def cases() -> Iterator[tuple[str, Op]]:
    """Every op at every stage where it differs, by the name of a benchmark's case."""
    for N, C in _SIZES:
        yield f"attention_{N}x{C // _HEADS}", _attention(N, N, C)
        yield f"cross_attention_{N}x{C // _HEADS}", _with_columns(N, C)
        yield f"dbim_{N}x{C // _HEADS}", _dbim(N, C)
        yield f"layer_norm_qkv_{N}x{C}", _projected("layer_norm_linear", N, C, 3 * C)
        yield f"layer_norm_linear_{N}x{C}", _projected("layer_norm_linear", N, C, C)
        yield f"layer_norm_geglu_{N}x{C}", _projected("layer_norm_geglu", N, C, 8 * C)
        yield f"linear_add_{N}x{C}", _projected("linear_add", N, C, C)
        yield f"linear_add_composed_{N}x{C}", _composed(N, C)
        side = int(N**0.5)
        yield f"group_norm_silu_{C}x{side}x{side}", _norm(C, side)
        yield f"conv3x3_{C}x{side}x{side}", _convolution(C, side)
        yield f"residual_add_{C}x{side}x{side}", _convolved(C, side)
        yield f"residual_apply_{N}x{C}", _residual(N, C)


def call(ops: Ops, op: Op, arguments: list[Any]) -> Callable[[], Tensor]:
    """A call whose result is a tensor."""
    function = getattr(ops, op.name)

    def run() -> Tensor:
        result = function(*arguments)
        return result if isinstance(result, Tensor) else result[0]

    return run


def products(x: Tensor, weight: Tensor) -> list[tuple[Callable[[], Tensor], float]]:
    """Large products of (n, n) matrices as a linear layer, a 1x1 and a 3x3 convolution, and their FLOPs."""
    n, side, width = len(x), 64, 640
    picture, kernel = x.view(1, n, 1, n).permute(0, 3, 1, 2), weight.view(n, n, 1, 1)
    small = x.flatten()[: ROWS * width * side**2].view(ROWS, side, side, width).permute(0, 3, 1, 2)
    kernels = weight.flatten()[: 9 * width**2].view(width, 3, 3, width).permute(0, 3, 1, 2)
    return [
        (lambda: F.linear(x, weight), 2.0 * n**3),
        (lambda: F.conv2d(picture, kernel), 2.0 * n**3),
        (lambda: F.conv2d(small, kernels, padding=1), 18.0 * ROWS * side**2 * width**2),
    ]


def operation_flops(name: str, tensors: list[Tensor], out: list[Tensor]) -> float:
    """Products of an operation, from its shapes; 0 for one that has none worth counting."""
    if name in ("conv2d", "_convolution_pointwise"):
        return 2.0 * out[0].numel() * tensors[1].numel() / tensors[1].shape[0]
    if name == "conv3x3":  # in float32 a quarter of them, by minimal filtering
        return 18.0 * out[0].numel() * tensors[0].shape[1] / (4 if tensors[0].dtype == torch.float32 else 1)
    if name in ("linear", "_linear_pointwise", "layer_norm_linear", "layer_norm_geglu"):
        x, weight = tensors[0], tensors[3 if name.startswith("layer_norm") else 1]
        return 2.0 * x.numel() * weight.shape[0]
    if name == "linear_add":
        second = 2.0 * tensors[4].numel() * tensors[5].shape[0] if len(tensors) > 4 else 0.0
        return 2.0 * tensors[0].numel() * tensors[1].shape[0] + second
    if name in ("attention", "cross_attention", "dbim"):
        return 4.0 * tensors[0].numel() * tensors[1].shape[1]
    return 0.0


def _attention(N: int, S: int, C: int) -> Op:
    def make(dtype: torch.dtype) -> list[Any]:
        return [*(random(ROWS, n, C).to(dtype) for n in (N, S, S)), _HEADS]

    return Op("attention", make, (C // _HEADS,), flops=4.0 * ROWS * N * S * C)


def _with_columns(N: int, C: int) -> Op:
    def make(dtype: torch.dtype) -> list[Any]:
        q, k, v, n_heads = _attention(N, _TEXT, C).arguments(dtype)
        return [q, k, v, torch.full((ROWS, 1), 5), n_heads]

    return Op("cross_attention", make, (C // _HEADS,), flops=4.0 * ROWS * N * _TEXT * C)


def _dbim(N: int, C: int) -> Op:
    def make(dtype: torch.dtype) -> list[Any]:
        q, k, v, n_heads = _attention(N, _TEXT, C).arguments(dtype)
        chosen = torch.zeros(ROWS, _TEXT, dtype=torch.bool)
        chosen[0, 5] = chosen[1, 1:8] = True
        return [q, k, v, chosen, torch.tensor([8, 8]), torch.tensor([_GATES]), n_heads, False]

    return Op("dbim", make, (C // _HEADS,), flops=4.0 * ROWS * N * _TEXT * C)


def _residual(N: int, C: int) -> Op:
    def make(dtype: torch.dtype) -> list[Any]:
        shapes = ((N, C), (N, C), (N, _HEADS), (_HEADS, C))
        x, out, columns, residuals = (random(ROWS, *shape).to(dtype) for shape in shapes)
        return [x, out, columns, torch.tensor([0, 1]), residuals]

    return Op("residual_apply", make, (C,), values=3.0 * ROWS * N * C)


def _convolution(C: int, side: int) -> Op:
    """Its FLOPs are those of 9 products a position, of which minimal filtering takes a quarter."""

    def make(dtype: torch.dtype) -> list[Any]:
        tensors = (random(ROWS, C, side, side), random(C, C, 3, 3) * (9 * C) ** -0.5)
        return [*(x.to(dtype).contiguous(memory_format=torch.channels_last) for x in tensors), random(C).to(dtype)]

    return Op("conv3x3", make, (C,), flops=18.0 * ROWS * side**2 * C**2)


def _convolved(C: int, side: int) -> Op:
    def make(dtype: torch.dtype) -> list[Any]:
        pictures = (random(ROWS, C, side, side).to(dtype) for _ in range(2))
        x, residual = (picture.contiguous(memory_format=torch.channels_last) for picture in pictures)
        return [x, residual, random(C).to(dtype)]

    return Op("residual_add", make, (C,), values=3.0 * ROWS * C * side**2)


def _norm(C: int, side: int) -> Op:
    def make(dtype: torch.dtype) -> list[Any]:
        x = random(ROWS, C, side, side).to(dtype).contiguous(memory_format=torch.channels_last)
        shift, weight, bias = (random(C).to(dtype) for _ in range(3))
        return [x, shift[None], weight, bias, 32, 1e-5]

    return Op("group_norm_silu", make, (C,), values=2.0 * ROWS * C * side**2)


def _projected(name: str, N: int, C: int, C_out: int) -> Op:
    def make(dtype: torch.dtype) -> list[Any]:
        x, weight, bias = random(ROWS, N, C), random(C_out, C) * C**-0.5, random(C_out)
        x, weight, bias, gamma, beta = (tensor.to(dtype) for tensor in (x, weight, bias, random(C), random(C)))
        if name == "linear_add":
            return [x, weight, bias, random(ROWS, N, C_out).to(dtype)]
        return [x, gamma, beta, 1e-5, weight, *([bias] if name == "layer_norm_geglu" else [])]

    return Op(name, make, (C, C_out), flops=2.0 * ROWS * N * C * C_out)


def _composed(N: int, C: int) -> Op:
    """A feed-forward's output projection and the transformer's, as one product of two inputs."""

    def make(dtype: torch.dtype) -> list[Any]:
        hidden, stream, residual = random(ROWS, N, 4 * C), random(ROWS, N, C), random(ROWS, N, C)
        inner, outer = random(C, 4 * C) * C**-0.5, random(C, C) * C**-0.5
        return [x.to(dtype) for x in (hidden, inner, random(C), residual, stream, outer)]

    return Op("linear_add", make, (4 * C, C, C), flops=10.0 * ROWS * N * C * C)
