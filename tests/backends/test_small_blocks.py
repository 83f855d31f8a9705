"""Whole blocks in one call, at every level this processor runs: accuracy, odd sizes, threads, packing, refusals."""

import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import engine
from engine.backends.native import levels
from engine.backends.ops import TORCH, Ops
from engine.backends.small_blocks import SmallBlocks
from engine.models.conditioning import Batch, Conditioning
from engine.models.layers import Downsample2D, ResnetBlock2D, Upsample2D
from engine.models.transformer import CrossAttention, FeedForward, SelfAttention

pytestmark = pytest.mark.skipif(not levels(), reason="native kernels are not built here")

_ERRORS = {torch.float32: 2e-6, torch.bfloat16: 2e-2}  # of a block, relative to its largest value
_RESNETS = [  # B, C_in, C_out, height, width, groups
    (2, 64, 64, 16, 16, 16),
    (2, 160, 96, 8, 8, 16),
    (1, 20, 36, 5, 7, 4),
    (3, 96, 64, 2, 2, 16),
    (1, 2, 2, 1, 1, 1),
    (1, 128, 250, 3, 11, 2),
]
_TOKENS = [  # B, N, heads, head dim, keys
    (2, 256, 4, 16, 77),
    (3, 4, 6, 16, 154),
    (1, 35, 3, 6, 5),
    (1, 1, 1, 2, 1),
    (2, 9, 5, 50, 20),
]


class _Spy:
    """Counts the calls of whole blocks."""

    def __init__(self, small: SmallBlocks) -> None:
        self.small, self.calls = small, 0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.small, name)
        if name in ("resnet", "convolution", "self_attention", "cross_attention", "feed_forward"):
            self.calls += 1
        return value


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape) + 0.3


def _compare(ops: Ops, dtype: torch.dtype, make: Callable[[Ops], nn.Module], run: Callable[[nn.Module, Any], Tensor]):
    """A block in one call against the same one in float64, op by op."""
    spy = _Spy(ops.small)  # type: ignore[arg-type]
    torch.manual_seed(0)
    reference, block = make(TORCH), make(replace(ops, small=spy))
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=max(parameter[0].numel(), 4) ** -0.5)
    block.load_state_dict(reference.state_dict())
    block.to(dtype, memory_format=torch.channels_last)
    reference.load_state_dict({name: weight.double() for name, weight in block.state_dict().items()}, assign=True)
    with torch.no_grad():
        actual = run(block, lambda x: x.to(dtype))
        expected = run(reference, lambda x: x.to(dtype).double())
    assert spy.calls == 1, "the block did not run whole"
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error <= _ERRORS[dtype], f"{error:.2e}"


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", _RESNETS, ids=str)
@pytest.mark.parametrize("n_shifts", ["none", "one", "each"])
def test_resnet(ops: Ops, dtype: torch.dtype, shape: tuple[int, ...], n_shifts: str) -> None:
    B, C, n_out, height, width, groups = shape
    x = _random(B, C, height, width).contiguous(memory_format=torch.channels_last)
    wide = _random(1 if n_shifts == "one" else B, n_out + 3)  # a part of a wider row, as the UNet's shifts are
    shift = None if n_shifts == "none" else wide[:, 1 : n_out + 1]
    _compare(
        ops,
        dtype,
        lambda ops: ResnetBlock2D(C, n_out, groups, 1e-5, ops),
        lambda block, as_type: block(as_type(x), None if shift is None else as_type(wide)[:, 1 : n_out + 1]),
    )


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("size", [(16, 16), (5, 8), (7, 3), (1, 1)], ids=str)
def test_downsampling(ops: Ops, dtype: torch.dtype, size: tuple[int, int]) -> None:
    x = _random(2, 20, *size).contiguous(memory_format=torch.channels_last)
    _compare(ops, dtype, lambda ops: Downsample2D(20, 1, ops), lambda block, as_type: block(as_type(x)))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("size", "to"), [((8, 8), (16, 16)), ((3, 4), (5, 8)), ((1, 2), (1, 3))], ids=str)
def test_upsampling(ops: Ops, dtype: torch.dtype, size: tuple[int, int], to: tuple[int, int]) -> None:
    x = _random(2, 24, *size).contiguous(memory_format=torch.channels_last)
    _compare(ops, dtype, lambda ops: Upsample2D(24, ops), lambda block, as_type: block(as_type(x), to))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("with_silu", [False, True])
@pytest.mark.parametrize(("side", "n_out"), [(1, 34), (3, 4)])
def test_convolution(ops: Ops, dtype: torch.dtype, side: int, n_out: int, with_silu: bool) -> None:
    """With a normalisation before and a residual after."""
    assert ops.small is not None
    torch.manual_seed(0)
    x = _random(2, 24, 5, 6).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (_random(n_out, 24, side, side) * 0.1).to(dtype)
    bias, norm = _random(n_out).to(dtype), (_random(24).to(dtype), _random(24).to(dtype))
    residual = _random(2, n_out, 5, 6).to(dtype).contiguous(memory_format=torch.channels_last)
    actual = ops.small.convolution(
        x, weight, bias, norm=norm, groups=4, eps=1e-3, with_silu=with_silu, residual=residual
    )
    normed = F.group_norm(x.double(), 4, norm[0].double(), norm[1].double(), 1e-3)
    normed = F.silu(normed) if with_silu else normed
    expected = F.conv2d(normed, weight.double(), bias.double(), padding=side // 2) + residual.double()
    assert (actual.double() - expected).abs().max() / expected.abs().max() <= _ERRORS[dtype]
    with pytest.raises(ValueError, match=r"residual must be \(2, \d+, 5, 6\), got \(1, "):
        ops.small.convolution(x, weight, bias, residual=residual[:1])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", _TOKENS, ids=str)
def test_self_attention(ops: Ops, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    B, N, heads, D, _ = shape
    norm, x = _norm(heads * D), _random(B, N, heads * D)
    _compare(
        ops,
        dtype,
        lambda ops: SelfAttention(heads * D, heads, ops),
        lambda block, as_type: block(as_type(x), _as(norm, as_type)),
    )


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", _TOKENS, ids=str)
def test_cross_attention(ops: Ops, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    B, N, heads, D, S = shape
    norm, x, keys, values = _norm(heads * D), _random(B, N, heads * D), *_random(2, B, S, heads * D)

    def make(ops: Ops) -> CrossAttention:
        block = CrossAttention(heads * D, 8, heads, ops)
        block.layer = 0
        return block

    def run(block: nn.Module, as_type: Any) -> Tensor:
        condition = Conditioning(Batch(((as_type(keys), as_type(values)),)), torch.empty(0))
        return block(as_type(x), _as(norm, as_type), condition)

    _compare(ops, dtype, make, run)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", [*_TOKENS, (2, 300, 1, 30, 0)], ids=str)
def test_feed_forward(ops: Ops, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    B, N, heads, D, _ = shape
    norm, x = _norm(heads * D), _random(B, N, heads * D)
    _compare(
        ops,
        dtype,
        lambda ops: FeedForward(heads * D, ops),
        lambda block, as_type: block(as_type(x), _as(norm, as_type)),
    )


def test_a_row_does_not_depend_on_its_batch_or_the_threads(ops: Ops, dtype: torch.dtype) -> None:
    block = ResnetBlock2D(64, 96, 16, 1e-5, ops).to(dtype, memory_format=torch.channels_last)
    x = _random(5, 64, 8, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    shift, before = _random(5, 96).to(dtype), torch.get_num_threads()
    with torch.no_grad():
        torch.set_num_threads(1)
        together = block(x, shift)
        torch.set_num_threads(2)
        alone = torch.cat([block(x[i : i + 1], shift[i : i + 1]) for i in range(5)])
        torch.set_num_threads(before)
    assert torch.equal(together, alone)


def test_a_changed_weight_is_packed_again(ops: Ops) -> None:
    block = FeedForward(32, ops)
    x, norm = _random(1, 4, 32), nn.LayerNorm(32)
    with torch.no_grad():
        before = block(x, norm)
        block.net[2].weight.mul_(-1.0)
        block.net[2].bias.mul_(-1.0)
        after = block(x, norm)
    assert torch.equal(after - x, x - before) or torch.allclose(after - x, x - before, atol=1e-6)


def test_packed_weights_live_as_long_as_their_weights(ops: Ops) -> None:
    assert ops.small is not None
    before, block = len(ops.small._packed), FeedForward(32, ops)
    with torch.no_grad():
        block(_random(1, 4, 32), nn.LayerNorm(32))
    assert len(ops.small._packed) == before + 2
    del block
    assert len(ops.small._packed) == before


def test_packed_weights_outlive_a_call_that_uses_them(ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another thread packs them anew, as after a change, while the call runs."""
    assert ops.small is not None
    small, alive = SmallBlocks(ops.small.library, ops.small.check), []

    class Library:
        def __getattr__(self, name: str) -> Any:
            return getattr(ops.small.library, name)  # type: ignore[union-attr]

        def twinstream_feed_forward(self, *_: Any) -> None:
            kept = [weakref.ref(packed) for ways in small._packed._kept.values() for _, packed in ways.values()]
            small._packed._kept.clear()
            alive.extend(one() is not None for one in kept)

    monkeypatch.setattr(small, "library", Library())
    with torch.no_grad():
        FeedForward(32, replace(ops, small=small))(_random(1, 4, 32), nn.LayerNorm(32))
    assert alive == [True, True]


def test_a_weight_is_packed_once_for_each_way_and_by_one_thread(ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.small is not None
    small = SmallBlocks(ops.small.library, ops.small.check)
    block = ResnetBlock2D(8, 8, 2, 1e-5, replace(ops, small=small)).to(memory_format=torch.channels_last)
    packed, pack, start = [], small._pack, threading.Barrier(4)
    monkeypatch.setattr(small, "_pack", lambda *given: packed.append(given) or time.sleep(0.01) or pack(*given))

    def run(_: int) -> list[Tensor]:
        start.wait()
        with torch.no_grad():
            sizes = (4, 8, 4, 8)  # the larger ones are filtered
            return [block(torch.ones(1, 8, n, n).contiguous(memory_format=torch.channels_last)) for n in sizes]

    with ThreadPoolExecutor(4) as threads:
        first, *others = threads.map(run, range(4))
    assert len(packed) == 4
    assert all(torch.equal(*pair) for other in others for pair in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("positions", "channels", "fits"),
    [(1024, (256, 256), True), (1025, (64,), False), (64, (258,), False), (64, (64, 63), False), (4096, (320,), False)],
)
def test_what_is_small(positions: int, channels: tuple[int, ...], fits: bool) -> None:
    assert SmallBlocks.fit(positions, *channels) == fits


def test_operands_that_do_not_fit_are_refused(ops: Ops) -> None:
    assert ops.small is not None
    block = ResnetBlock2D(8, 8, 2, 1e-5, ops).to(memory_format=torch.channels_last)
    x = _random(2, 8, 4, 4)
    with torch.no_grad():
        with pytest.raises(ValueError, match="contiguous"):
            block(x, _random(2, 8))
        x = x.contiguous(memory_format=torch.channels_last)
        with pytest.raises(ValueError, match=r"shift must be \(1 or 2, 8\), got \(3, 8\)"):
            block(x, _random(3, 8))
        with pytest.raises(ValueError, match=r"must be torch.bfloat16 like what they act upon.*got torch.float32"):
            block(x.bfloat16(), _random(2, 8).bfloat16())
        keys, tokens = _random(2, 5, 8), _random(2, 3, 8)
        of_norm, to_out = (torch.ones(8), torch.zeros(8)), (torch.eye(8), None)
        with pytest.raises(ValueError, match=r"keys and values must be \(2, 'S', 8\), got \(2, 5, 8\) and \(2, 4, 8\)"):
            ops.small.cross_attention(tokens, keys, keys[:, 1:].contiguous(), of_norm, 1e-5, torch.eye(8), to_out, 2)


def test_the_embedded_model_runs_in_whole_blocks() -> None:
    """Its pictures differ from torch's by rounding alone."""
    small, plain = engine.load(backend="native"), engine.load(backend="torch")
    options: dict[str, Any] = {"steps": 4, "seed": 3, "output": "latent", "progress": False}
    ours, theirs = (e.generate("a photo of a red cat on a beach", **options).latents for e in (small, plain))
    assert len(small.backend.small._packed) > 40  # type: ignore[union-attr]
    assert (ours - theirs).abs().max() / theirs.abs().max() <= 1e-5


def _norm(channels: int) -> nn.LayerNorm:
    norm = nn.LayerNorm(channels)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def _as(norm: nn.LayerNorm, as_type: Any) -> nn.LayerNorm:
    other = nn.LayerNorm(norm.normalized_shape)
    other.weight, other.bias = nn.Parameter(as_type(norm.weight)), nn.Parameter(as_type(norm.bias))
    return other
