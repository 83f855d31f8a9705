"""Single ops at SD v1.5's sizes on this CPU, native beside eager, and the machine's ceilings in the same run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import Keep
from benchmarks.ops import ROWS, call, cases, products, random, relative_error
from benchmarks.turns import milliseconds, take_turns
from engine.backends.native import levels, native_ops
from engine.backends.ops import TORCH

pytestmark = pytest.mark.skipif(not levels(), reason="native kernels are not built here")

_ROUNDS = 9
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_CASES = {
    name: op
    for name, op in cases()
    if op.name in ("attention", "conv3x3") or any(size in name for size in ("_4096x", "_320x64"))
}


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("case", _CASES)
@torch.no_grad()
def test_op(benchmark: Any, keep: Keep, case: str, dtype: str) -> None:
    op, kind = _CASES[case], _DTYPES[dtype]
    arguments = op.arguments(kind)
    exact = call(TORCH, op, [wide(argument) for argument in arguments])()
    # eager first: ours may use up an argument
    calls = {name: call(ops, op, arguments) for name, ops in (("torch_eager", TORCH), ("twinstream", native_ops()))}
    errors = {name: relative_error(run(), exact) for name, run in calls.items()}
    peers = {"torch_eager": calls["torch_eager"]}
    seconds = take_turns(benchmark, calls["twinstream"], peers, _ROUNDS)
    prefix = {"case": case, "dtype": dtype, "rows": ROWS, **op.work(kind)}
    keep([{**prefix, "system": n, **milliseconds(each), "rel_error": errors[n]} for n, each in seconds.items()])
    assert errors["twinstream"] <= 2 * errors["torch_eager"] + torch.finfo(kind).eps


@pytest.mark.parametrize("dtype", _DTYPES)
@torch.no_grad()
def test_ceilings(benchmark: Any, keep: Keep, dtype: str) -> None:
    """torch's fastest product, among a linear layer, a 1x1 and a 3x3 convolution, and a copy."""
    kind, n = _DTYPES[dtype], 3072
    source = random(1 << 24).to(kind)
    target = torch.empty_like(source)
    calls = products(random(n, n).to(kind), random(n, n).to(kind))
    peers = {str(i): call for i, (call, _) in enumerate(calls)}
    seconds = take_turns(benchmark, lambda: target.copy_(source), peers, 7)
    i = min(range(len(calls)), key=lambda i: sorted(seconds[str(i)])[3] / calls[i][1])
    prefix = {"dtype": dtype, "rows": 1, "system": "ceiling", "rel_error": 0.0}
    keep(
        [
            {**prefix, "case": "product", **milliseconds(seconds[str(i)]), "flops": calls[i][1]},
            {**prefix, "case": "copy", **milliseconds(seconds["twinstream"]), "bytes": 2.0 * source.nbytes},
        ]
    )


def wide(argument: Any) -> Any:
    """The argument in float64."""
    return argument.double() if isinstance(argument, Tensor) and argument.is_floating_point() else argument
