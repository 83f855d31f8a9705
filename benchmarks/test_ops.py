"""Single ops at SD v1.5's sizes on this CPU, native beside eager, and the machine's ceilings in the same run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.turns import milliseconds, take_turns
from engine.native import levels, native_ops
from engine.ops import TORCH

pytestmark = pytest.mark.skipif(not levels(), reason="native kernels are not built here")

_ROWS, _ROUNDS = 2, 9
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_GATES = (1.0, 10.0, 10.0, 500.0)


@dataclass(frozen=True, slots=True)
class Op:
    """A call of ``Ops.name``: its arguments for a dtype, and its work in FLOPs, or in values moved."""

    name: str
    arguments: Callable[[torch.dtype], list[Any]]
    flops: float = 0.0
    values: float = 0.0


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _attention(N: int, S: int, D: int) -> Op:
    C = 8 * D
    make = lambda dtype: [*(_random(_ROWS, n, C).to(dtype) for n in (N, S, S)), 8]  # noqa: E731
    return Op("attention", make, flops=4.0 * _ROWS * N * S * C)


def _with_columns(dtype: torch.dtype) -> list[Any]:
    q, k, v, n_heads = _attention(4096, 77, 40).arguments(dtype)
    return [q, k, v, torch.full((_ROWS, 1), 5), n_heads]


def _dbim(dtype: torch.dtype) -> list[Any]:
    q, k, v, n_heads = _attention(4096, 77, 40).arguments(dtype)
    chosen = torch.zeros(_ROWS, 77, dtype=torch.bool)
    chosen[0, 5] = chosen[1, 1:8] = True
    return [q, k, v, chosen, torch.tensor([8, 8]), torch.tensor([_GATES]), n_heads, False]


def _residual(dtype: torch.dtype) -> list[Any]:
    x, out, columns, residuals = (_random(_ROWS, *shape).to(dtype) for shape in _RESIDUAL_SHAPES)
    return [x, out, columns, torch.tensor([0, 1]), residuals]


def _convolved(dtype: torch.dtype) -> list[Any]:
    x, residual = (_random(_ROWS, 320, 64, 64).to(dtype) for _ in range(2))
    layout = torch.channels_last
    return [x.contiguous(memory_format=layout), residual.contiguous(memory_format=layout), _random(320).to(dtype)]


def _projected(op: str, *, gated: bool = False) -> Callable[[torch.dtype], list[Any]]:
    """320 channels at 64x64: normalised and projected, gated, or added to a residual."""

    def make(dtype: torch.dtype) -> list[Any]:
        x, weight = _random(_ROWS, 4096, 320), _random(2560 if gated else 320, 320) * 320**-0.5
        tensors = [x, _random(320), _random(320), weight, _random(len(weight)), _random(_ROWS, 4096, 320)]
        x, gamma, beta, weight, bias, residual = (tensor.to(dtype) for tensor in tensors)
        if op == "linear_add":
            return [x, weight, bias, residual]
        return [x, gamma, beta, 1e-5, weight, *([bias] if gated else [])]

    return make


def _norm(*shape: int) -> Callable[[torch.dtype], list[Any]]:
    def make(dtype: torch.dtype) -> list[Any]:
        x = _random(*shape).to(dtype).contiguous(memory_format=torch.channels_last)
        shift, weight, bias = (_random(shape[1]).to(dtype) for _ in range(3))
        return [x, shift[None], weight, bias, 32, 1e-5]

    return make


_RESIDUAL_SHAPES = ((4096, 320), (4096, 320), (4096, 8), (8, 320))
_CROSS_FLOPS = 4.0 * _ROWS * 4096 * 77 * 320
_CASES = {
    "attention_4096x40": _attention(4096, 4096, 40),
    "attention_1024x80": _attention(1024, 1024, 80),
    "attention_256x160": _attention(256, 256, 160),
    "cross_attention_4096x40": Op("cross_attention", _with_columns, flops=_CROSS_FLOPS),
    "dbim_4096x40": Op("dbim", _dbim, flops=_CROSS_FLOPS),
    "residual_apply_4096x320": Op("residual_apply", _residual, values=3.0 * _ROWS * 4096 * 320),
    "group_norm_silu_320x64x64": Op("group_norm_silu", _norm(_ROWS, 320, 64, 64), values=2.0 * _ROWS * 320 * 4096),
    "group_norm_silu_1280x16x16": Op("group_norm_silu", _norm(_ROWS, 1280, 16, 16), values=2.0 * _ROWS * 1280 * 256),
    "residual_add_320x64x64": Op("residual_add", _convolved, values=3.0 * _ROWS * 320 * 4096),
    "layer_norm_linear_4096x320": Op(
        "layer_norm_linear", _projected("layer_norm_linear"), flops=2.0 * _ROWS * 4096 * 320 * 320
    ),
    "layer_norm_geglu_4096x320": Op(
        "layer_norm_geglu", _projected("layer_norm_geglu", gated=True), flops=2.0 * _ROWS * 4096 * 320 * 2560
    ),
    "linear_add_4096x320": Op("linear_add", _projected("linear_add"), flops=2.0 * _ROWS * 4096 * 320 * 320),
}


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("case", _CASES)
@torch.no_grad()
def test_op(benchmark: Any, case: str, dtype: str) -> None:
    op = _CASES[case]
    arguments = op.arguments(_DTYPES[dtype])
    calls = {name: getattr(ops, op.name) for name, ops in (("twinstream", native_ops()), ("torch_eager", TORCH))}
    exact = _first(calls["torch_eager"](*(_wide(argument) for argument in arguments)))
    errors = {name: _error(_first(call(*arguments)), exact) for name, call in calls.items()}
    assert errors["twinstream"] <= 2 * errors["torch_eager"] + torch.finfo(_DTYPES[dtype]).eps
    peers = {"torch_eager": lambda: calls["torch_eager"](*arguments)}
    seconds = take_turns(benchmark, lambda: calls["twinstream"](*arguments), peers, _ROUNDS)
    work = {"flops": op.flops} if op.flops else {"bytes": op.values * _DTYPES[dtype].itemsize}
    prefix = {"case": case, "dtype": dtype, "rows": _ROWS}
    benchmark.extra_info["records"] = [
        {**prefix, "system": name, **milliseconds(each), "rel_error": errors[name], **work}
        for name, each in seconds.items()
    ]


@pytest.mark.parametrize("dtype", _DTYPES)
@torch.no_grad()
def test_ceilings(benchmark: Any, dtype: str) -> None:
    """torch's fastest product of large matrices, among linear layers and 1x1 convolutions, and a copy."""
    kind, n = _DTYPES[dtype], 3072
    x, weight = _random(n, n).to(kind), _random(n, n).to(kind)
    picture, kernel = x.view(1, n, 1, n).permute(0, 3, 1, 2), weight.view(n, n, 1, 1)
    source = _random(1 << 24).to(kind)
    target = torch.empty_like(source)
    peers = {"linear": lambda: F.linear(x, weight), "conv": lambda: F.conv2d(picture, kernel)}
    seconds = take_turns(benchmark, lambda: target.copy_(source), peers, 7)
    product = min(seconds["linear"], seconds["conv"], key=lambda each: sorted(each)[len(each) // 2])
    prefix = {"dtype": dtype, "rows": 1, "system": "ceiling", "rel_error": 0.0}
    benchmark.extra_info["records"] = [
        {**prefix, "case": "product", **milliseconds(product), "flops": 2.0 * n**3},
        {**prefix, "case": "copy", **milliseconds(seconds["twinstream"]), "bytes": 2.0 * source.nbytes},
    ]


def _wide(argument: Any) -> Any:
    return argument.double() if isinstance(argument, Tensor) and argument.is_floating_point() else argument


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def _error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())
