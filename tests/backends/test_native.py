"""Native CPU kernels, at every level this processor runs: accuracy, odd sizes, threads, alignment, refusals."""

import copy
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import engine
from engine.backends import native
from engine.backends.native import LEVELS, Kernels, levels, native_kernels, native_ops
from engine.backends.ops import TORCH, Ops
from engine.backends.packed_weights import PackedLinear, _is_worth_packing, can_pack
from engine.kernels.cross_attention import cross_attention_ref
from engine.kernels.geglu import geglu_ref
from engine.models.layers import PointwiseConv2d, pack_convolutions
from tests.kernels.accuracy import assert_as_accurate
from tests.kernels.test_dbim import _PRESETS
from tests.kernels.test_dbim import _inputs as dbim_inputs

pytestmark = pytest.mark.skipif(not levels(), reason="native kernels are not built here")

_ATTENTION = [  # B, N, S, heads, head dim
    (2, 64, 64, 2, 40),
    (1, 257, 1000, 2, 80),
    (1, 9, 4096, 1, 40),
    (1, 7, 300, 2, 160),
    (3, 33, 77, 3, 8),
    (1, 9, 5, 1, 33),
    (1, 70, 130, 1, 512),
    (1, 1, 1, 1, 1),
]


def _random(*shape: int, dtype: torch.dtype, aligned: bool = False) -> Tensor:
    """A contiguous tensor, one element behind any alignment unless asked for."""
    count = int(torch.tensor(shape).prod())
    storage = torch.randn(count + 1).to(dtype)
    return storage[0 if aligned else 1 :][:count].view(shape)


def _compare(op: str, ops: Ops, *arguments: Any) -> None:
    """Native and eager results of one op against eager ones in float64."""
    _compare_functions(getattr(ops, op), getattr(TORCH, op), *arguments)


def _compare_functions(actual: Callable[..., Any], eager: Callable[..., Any], *arguments: Any) -> None:
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    results = [eager(*wide), eager(*arguments), actual(*arguments)]
    exact, eager, actual = ([result] if isinstance(result, Tensor) else result for result in results)
    for one, its_eager, its_exact in zip(actual, eager, exact, strict=True):
        assert torch.isfinite(one).all()
        assert_as_accurate(one, its_eager, its_exact)


@pytest.mark.parametrize("shape", _ATTENTION, ids=str)
def test_attention(ops: Ops, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    B, N, S, H, D = shape
    q, k, v = (_random(B, n, H * D, dtype=dtype) for n in (N, S, S))
    _compare("attention", ops, 3 * q, k, v, H)


def test_attention_where_all_logits_are_far_below_zero(ops: Ops, dtype: torch.dtype) -> None:
    """Below what exp underflows at, so that the maximum itself has to be found."""
    q, k, v = (_random(1, n, 2 * 8, dtype=dtype) for n in (9, 40, 40))
    q, k = (50 + q).to(dtype), (-50 + k).to(dtype)
    assert float(q[0, 0, :8].double() @ k[0, 0, :8].double()) / 8**0.5 < -1000
    out = ops.attention(q, k, v, 2)
    assert torch.isfinite(out).all()
    _compare("attention", ops, q, k, v, 2)


def test_attention_to_parts_of_one_projection(ops: Ops, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = _random(2, 33, 3 * 80, dtype=dtype).chunk(3, dim=-1)
    _compare("attention", ops, q, k, v, 2)
    parts = (x.contiguous() for x in (q, k, v))
    assert torch.equal(ops.attention(q, k, v, 2), ops.attention(*parts, 2))


def test_attention_of_large_scores(ops: Ops, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (_random(1, n, 40, dtype=dtype) for n in (20, 500, 500))
    q = 100 * q
    scores = q.double() @ k.double().mT
    exact = (scores * 40**-0.5).softmax(dim=-1) @ v.double()
    rounded = (scores.float().double() * 40**-0.5).softmax(dim=-1) @ v.double()  # what scores in float32 cost anyone
    eager = TORCH.attention(q, k, v, 1)
    allowed = rounded.to(dtype) if (rounded - exact).abs().max() > (eager - exact).abs().max() else eager
    assert_as_accurate(ops.attention(q, k, v, 1), allowed, exact)


@pytest.mark.parametrize("n_tokens", [0, 1, 3])
@pytest.mark.parametrize("shape", [(2, 64, 77, 2, 40), (3, 33, 77, 3, 8), (1, 9, 5, 1, 33)], ids=str)
def test_cross_attention(ops: Ops, dtype: torch.dtype, shape: tuple[int, ...], n_tokens: int) -> None:
    torch.manual_seed(0)
    B, N, S, H, D = shape
    q, k, v = (_random(B, n, H * D, dtype=dtype) for n in (N, S, S))
    tokens = torch.randint(0, S, (B, n_tokens))
    exact = cross_attention_ref(q.double(), k.double(), v.double(), tokens, H)
    eager, actual = cross_attention_ref(q, k, v, tokens, H), ops.cross_attention(q, k, v, tokens, H)
    for results in zip(actual, eager, exact, strict=True):
        assert_as_accurate(*results) if results[0].numel() else None
        assert results[0].shape == results[2].shape


@pytest.mark.parametrize("preset", _PRESETS)
@pytest.mark.parametrize("shape", [(1, 64, 2, 40), (2, 33, 1, 16), (1, 257, 3, 8)], ids=str)
def test_dbim(ops: Ops, dtype: torch.dtype, shape: tuple[int, ...], preset: str) -> None:
    arguments = list(dbim_inputs(shape, dtype, preset).values())
    _compare("dbim", ops, *arguments)


@pytest.mark.parametrize("strength", [-1e4, -2.0, 0.0, 2.0, 1e4])
def test_dbim_saturated(ops: Ops, strength: float) -> None:
    inputs = dbim_inputs((1, 40, 2, 16), torch.float32, ((10.0, 1000.0, 500.0), False), strength, size=20.0)
    _compare("dbim", ops, *inputs.values())


@pytest.mark.parametrize("shape", [(3, 64, 2, 40), (2, 5, 3, 7), (1, 33, 8, 320)], ids=str)
def test_residual_apply(ops: Ops, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    F, N, K, C = shape
    x, out, columns = _random(F, N, C, dtype=dtype), _random(2, N, C, dtype=dtype), _random(2, N, K, dtype=dtype)
    leaders, residuals = torch.randint(0, 2, (F,)), _random(F, K, C, dtype=dtype)
    _compare("residual_apply", ops, x, out, columns, leaders, residuals)
    nothing = ops.residual_apply(x, out, columns, leaders, torch.zeros_like(residuals))
    assert torch.equal(nothing, (x.float() + out[leaders].float()).to(dtype))


@pytest.mark.parametrize("op", ["group_norm", "group_norm_silu"])
@pytest.mark.parametrize("shape", [(2, 64, 8, 8, 32), (1, 96, 5, 7, 3), (2, 10, 1, 1, 5), (1, 33, 70, 3, 1)], ids=str)
def test_group_norm(ops: Ops, dtype: torch.dtype, threads: int, shape: tuple[int, ...], op: str) -> None:
    torch.manual_seed(threads)
    B, C, height, width, groups = shape
    x = _random(B, height, width, C, dtype=dtype).permute(0, 3, 1, 2)
    weight, bias = _random(C, dtype=dtype), _random(C, dtype=dtype)
    shifts = [()] if op == "group_norm" else [(None,), (_random(1, C, dtype=dtype),), (_random(B, C, dtype=dtype),)]
    for shift in shifts:
        _compare(op, ops, x, *shift, weight, bias, groups, 1e-5)
        y = getattr(ops, op)(x, *shift, weight, bias, groups, 1e-5)
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_group_norm_of_a_large_mean(ops: Ops) -> None:
    torch.manual_seed(0)
    x = (torch.randn(1, 32, 16, 16) + 300).contiguous(memory_format=torch.channels_last)
    _compare("group_norm", ops, x, torch.ones(32), torch.zeros(32), 4, 1e-5)


@pytest.mark.parametrize("shape", [(2, 64, 8, 8), (1, 33, 5, 7), (1, 1, 1, 1)], ids=str)
def test_residual_add(ops: Ops, dtype: torch.dtype, threads: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(threads)
    B, C, height, width = shape
    x, residual = (_random(B, height, width, C, dtype=dtype).permute(0, 3, 1, 2) for _ in range(2))
    _compare("residual_add", ops, x, residual, _random(C, dtype=dtype))


@pytest.mark.parametrize("shape", [(2, 64, 320), (3, 5, 33), (1, 1, 1)], ids=str)
def test_layer_norm(kernels: Kernels, dtype: torch.dtype, threads: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(threads)
    x, C = 3 * _random(*shape, dtype=dtype) + 5, shape[-1]
    eager = lambda x, weight, bias, eps: torch.nn.functional.layer_norm(x, (C,), weight, bias, eps)  # noqa: E731
    _compare_functions(kernels.layer_norm, eager, x, _random(C, dtype=dtype), _random(C, dtype=dtype), 1e-5)


@pytest.mark.parametrize("shape", [(2, 64, 640), (3, 5, 34), (1, 2)], ids=str)
def test_geglu(kernels: Kernels, dtype: torch.dtype, threads: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(threads)
    _compare_functions(kernels.geglu, geglu_ref, 3 * _random(*shape, dtype=dtype))
    extreme = torch.tensor([[1.0, 1.0, 1.0, 1.0, -200.0, 200.0, 0.0, -6.0]]).to(dtype)
    _compare_functions(kernels.geglu, geglu_ref, extreme)


@pytest.mark.parametrize("shape", [(2, 64, 40), (1, 9, 33)], ids=str)
def test_products(ops: Ops, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    C = shape[-1]
    x, norm = _random(*shape, dtype=dtype), (_random(C, dtype=dtype), _random(C, dtype=dtype), 1e-5)
    weight, bias = _random(2 * C, C, dtype=dtype), _random(2 * C, dtype=dtype)
    _compare("layer_norm_linear", ops, x, *norm, weight)
    _compare("layer_norm_geglu", ops, x, *norm, weight, bias)
    residual, z = _random(*shape[:-1], 2 * C, dtype=dtype), _random(*shape[:-1], 4 * C, dtype=dtype)
    _compare("linear_add", ops, x, weight, bias, residual)
    _compare("linear_add", ops, x, weight, bias, residual, z, _random(2 * C, 4 * C, dtype=dtype))


@pytest.mark.parametrize("level", LEVELS)
def test_a_whole_picture(small_folder: Any, small: engine.Engine, level: str) -> None:
    if level not in levels():
        pytest.skip(f"this processor runs {', '.join(levels())}")
    reference = engine.load(small_folder, backend="torch")
    assert small.backend.name == "native"
    native = engine.load(small_folder, backend="native")
    for module in [*native.unet.modules(), *native.vae.modules()]:
        if hasattr(module, "ops"):
            module.ops = native_ops(level)
    options = {"steps": 3, "seed": 0, "output": "latent", "progress": False, "customization": engine.DCI("cat", "dog")}
    expected = reference.generate("a photo of a cat", **options).latents
    actual = native.generate("a photo of a cat", **options).latents
    assert float((actual - expected).norm() / expected.norm()) < 2e-5
    for images in (expected, expected[:, :, :5, :7]):
        torch.testing.assert_close(native.vae.decode(images), reference.vae.decode(images), rtol=1e-4, atol=1e-4)


def test_more_keys_than_a_row_of_the_map(ops: Ops, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (_random(2, n, 32, dtype=dtype) for n in (9, 462, 462))
    _compare("cross_attention", ops, q, k, v, torch.randint(0, 462, (2, 3)), 2)
    chosen = torch.zeros(2, 462, dtype=torch.bool)
    chosen[:, 2:40] = True
    gates = torch.tensor([[1.0, 10.0, 10.0, 500.0]])
    _compare("dbim", ops, q, k, v, chosen, torch.tensor([150, 140]), gates, 2, False)


def test_refusals(small_folder: Any) -> None:
    ops = native_ops()
    x = torch.randn(1, 4, 8)
    kernels = native_kernels()
    for wrong in (x.half(), x.double()):
        with pytest.raises(ValueError, match="native kernels take float32 or bfloat16 CPU tensors of one dtype"):
            kernels.geglu(wrong)
    with pytest.raises(ValueError, match="native kernels take contiguous tensors"):
        kernels.geglu(x.transpose(1, 2))
    with pytest.raises(ValueError, match="rows that are evenly apart"):
        ops.attention(x.expand(2, 4, 8), x, x, 1)
    picture = torch.randn(1, 4, 1, 1)
    with pytest.raises(ValueError, match=r"shift must be \(1 or 1, 4\), its channels side by side, got \(2, 4\)"):
        ops.group_norm_silu(picture, torch.zeros(2, 4), torch.ones(4), torch.ones(4), 2, 1e-5)
    with pytest.raises(RuntimeError, match="no gradients"):
        kernels.geglu(x.clone().requires_grad_())
    with pytest.raises(ValueError, match="must be channels-last"):
        ops.group_norm(torch.randn(1, 4, 3, 5), torch.ones(4), torch.ones(4), 2, 1e-5)
    wide = torch.randn(1, 4, 1024)
    with pytest.raises(ValueError, match="head dims must be at most 512"):
        ops.attention(wide, wide, wide, 1)
    with pytest.raises(RuntimeError, match="backend 'native' needs float32 or bfloat16 on a CPU"):
        engine.load(small_folder, backend="native", dtype="float16")
    with pytest.raises(RuntimeError, match="got 'avx1024'"):
        native_ops("avx1024")
    with pytest.raises(ValueError, match=r"take torch\.int64 on the CPU here, got torch\.int32"):
        ops.residual_apply(x, x, x, torch.zeros(1, dtype=torch.int32), x)
    assert all(getattr(ops, field.name) for field in fields(Ops))


def test_without_a_build_torch_serves(small_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    levels.cache_clear()
    native_kernels.cache_clear()
    try:
        assert levels() == ()
        assert engine.load(small_folder).backend is TORCH
        with pytest.raises(RuntimeError, match="native kernels are not built; with a C"):
            engine.load(small_folder, backend="native")
    finally:
        monkeypatch.undo()
        levels.cache_clear()
        native_kernels.cache_clear()


def test_packed_convolutions_follow_their_weights(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 24, 3, stride=2, padding=1), torch.nn.Conv2d(24, 5, 1))
    model.to(dtype).requires_grad_(False)
    plain, state = copy.deepcopy(model), model.state_dict()
    pack_convolutions(model)
    assert [type(module).__name__ for module in model] == ["PackedConv2d", "PackedConv2d"]
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    few, many = torch.randn(2, 8, 9, 7).to(dtype), torch.randn(1, 8, 40, 40).to(dtype)
    other = torch.nn.Parameter(torch.randn_like(model[0].weight), requires_grad=False)
    changes = (lambda conv: None, lambda conv: conv.weight.mul_(2), lambda conv: setattr(conv, "weight", other))
    for change in changes:
        change(model[0])
        plain[0].weight = torch.nn.Parameter(model[0].weight.clone(), requires_grad=False)
        for x in (few, many, few):
            exact = copy.deepcopy(plain).double()(x.double())
            assert_as_accurate(model(x), plain(x), exact)
    assert torch.equal(copy.deepcopy(model)(few), model(few))


def test_packed_linears_follow_their_weights(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.backends.packed_weights._is_worth_packing", lambda _rows, _weight: True)
    torch.manual_seed(0)
    linear, x = PackedLinear(), torch.randn(2, 9, 33).to(dtype)
    weight, bias = torch.nn.Parameter(torch.randn(24, 33).to(dtype), requires_grad=False), torch.randn(24).to(dtype)
    for factor in (None, 2, None):
        if factor is not None:
            weight.mul_(factor)
        exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        assert_as_accurate(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias), exact)
    assert len(linear._packed) == can_pack(dtype)
    del weight
    assert len(linear._packed) == 0  # nor is what was packed kept longer than the weight


def test_only_what_gains_enough_is_packed() -> None:
    wide, square = (torch.empty(n, 1280, device="meta") for n in (3840, 1280))
    assert _is_worth_packing(512, wide)
    assert not _is_worth_packing(512, square)
    assert _is_worth_packing(2048, square)
    assert not _is_worth_packing(2048, torch.empty(32, 32, device="meta"))
    assert _is_worth_packing(1, square.to(torch.bfloat16))


def test_packed_pointwise_convolutions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(PointwiseConv2d(33, 24)).to(dtype).requires_grad_(False)
    x, exact = torch.randn(2, 9, 33).to(dtype), copy.deepcopy(model).double()
    plain, state = model(x), model.state_dict()
    pack_convolutions(model)
    assert type(model[0]).__name__ == "PackedPointwiseConv2d"
    assert model.state_dict().keys() == state.keys()
    for one in (model, copy.deepcopy(model)):
        assert_as_accurate(one(x), plain, exact(x.double()))


def test_without_packed_layouts_plain_weights_serve(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.backends.packed_weights.can_pack", lambda _dtype: False)
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Conv2d(8, 24, 3, padding=1)).to(dtype), torch.randn(1, 8, 4, 4).to(dtype)
    expected = model.requires_grad_(False)(x)
    pack_convolutions(model)
    assert torch.equal(model(x), expected)
    rows, weight = torch.randn(3, 8).to(dtype), torch.randn(5, 8).to(dtype)
    assert torch.equal(PackedLinear()(rows, weight), torch.nn.functional.linear(rows, weight))
