"""The core of the fused products: every way to walk, in the interpreter (or on a GPU), and which way is taken."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import product as module
from engine.kernels.layer_norm_linear import FoldedWeights, fold
from engine.kernels.product import Product, multiply
from engine.kernels.product_tiles import CARDS, HALVES, Card, Tile, best_tile, has_descriptors, tiles_of
from tests.kernels.accuracy import assert_as_accurate

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_BFLOAT16 = pytest.param(  # which products of the interpreter do not know
    torch.bfloat16, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
)
_WAYS = {  # two programs take several tiles each
    "pointers": Tile(64, 64, 0, 32, 4, 3),
    "two widths": Tile(64, 32, 16, 32, 4, 3),
    "parts": Tile(64, 64, 16, 32, 4, 3, splits=3),
    "descriptors": Tile(64, 64, 0, 32, 4, 3, tma=True, programs=2),
    "descriptors, two widths": Tile(64, 32, 16, 32, 4, 3, tma=True, programs=2),
    "descriptors, parts": Tile(64, 64, 16, 32, 4, 3, tma=True, programs=2, splits=3),
}
_SHAPES = [(70, 100, 136, 40), (1, 16, 8, 0), (130, 7, 40, 48), (9, 65, 96, 0)]  # M, N, K, K_z
_COUNTER = torch.Generator()


def _draw(*size: int, dtype: torch.dtype, scale: float = 1.0, mean: float = 0.0) -> Tensor:
    return (scale * torch.randn(size, generator=_COUNTER) + mean).to(_DEVICE, dtype)


def _product(M: int, N: int, K: int, K_z: int, dtype: torch.dtype, gated: bool = False) -> Product:
    _COUNTER.manual_seed(0)
    rows = 2 * N if gated else N
    x, weight = _draw(M, K, dtype=dtype), _draw(rows, K, dtype=dtype, scale=K**-0.5)
    z, z_weight = (_draw(n, K_z, dtype=dtype, scale=K_z**-0.25) if K_z and not gated else None for n in (M, rows))
    residual = None if gated else _draw(M, N, dtype=dtype)
    return Product(x, weight, z, z_weight, _draw(rows, dtype=dtype), residual, gated=gated)


def _eager(product: Product, dtype: torch.dtype) -> Tensor:
    x, weight, z, z_weight, bias, residual = (
        None if one is None else one.to(dtype)
        for one in (product.x, product.weight, product.z, product.z_weight, product.bias, product.residual)
    )
    assert x is not None
    assert weight is not None
    y = F.linear(x, weight, bias)
    if product.gated:
        value, gate = y.chunk(2, dim=-1)
        return value * F.gelu(gate)
    if z is not None:
        y = y + F.linear(z, z_weight)
    return y if residual is None else residual + y


def _run(product: Product, tile: Tile | None) -> Tensor:
    y = torch.full(product.sizes[:2], torch.nan, dtype=product.x.dtype, device=_DEVICE)
    return multiply(product, y, tile=tile)


@pytest.mark.parametrize("dtype", [torch.float16, _BFLOAT16], ids=str)
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
@pytest.mark.parametrize("way", _WAYS)
def test_every_way(way: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    product, tile = _product(*shape, dtype), _WAYS[way]
    if tile.splits > -(-shape[2] // tile.block_k):  # a part would be empty
        tile = replace(tile, splits=1)
    assert_as_accurate(_run(product, tile), _eager(product, dtype), _eager(product, torch.float64))


@pytest.mark.parametrize("way", ["pointers", "parts", "descriptors", "descriptors, parts"])
@pytest.mark.parametrize("width", [32, 128])
def test_gated(way: str, width: int) -> None:
    """Columns of both halves end within a tile; 128 are finished in halves."""
    for shape in ((70, 100, 136, 0), (3, 200, 104, 0)):
        product = _product(*shape, torch.float16, gated=True)
        tile = replace(_WAYS[way], block_n=width, block_n2=width)
        exact = _eager(product, torch.float64)
        assert_as_accurate(_run(product, tile), _eager(product, torch.float16), exact)


def test_float32_without_anything_after() -> None:
    product = replace(_product(70, 33, 45, 0, torch.float32), bias=None, residual=None)
    assert_as_accurate(_run(product, None), _eager(product, torch.float32), _eager(product, torch.float64))


@pytest.mark.parametrize("K_z", [8, 48, 300])
def test_a_second_input_of_any_size(K_z: int) -> None:
    """It may need more steps than the first, or fewer."""
    product = _product(20, 30, 72, K_z, torch.float16)
    for way in ("pointers", "parts", "descriptors, parts"):
        if K_z % 8 == 0 or "descriptors" not in way:
            assert_as_accurate(
                _run(product, _WAYS[way]), _eager(product, torch.float16), _eager(product, torch.float64)
            )


@pytest.mark.parametrize("mean", [0.0, 30.0, 300.0])
@pytest.mark.parametrize("gamma", [1.0, 1e-4])
@pytest.mark.parametrize("way", ["pointers", "parts", "descriptors"])
def test_layer_norm_behind_the_product(way: str, gamma: float, mean: float) -> None:
    """Against eager code that normalises first: large means cancel, and small weights of a norm cost no bits."""
    dtype, (M, N, K) = torch.float16, (20, 40, 128)
    _COUNTER.manual_seed(1)
    x, weight, bias = _draw(M, K, dtype=dtype, mean=mean), _draw(N, K, dtype=dtype, scale=0.1), _draw(N, dtype=dtype)
    norm = _draw(K, dtype=dtype, scale=gamma), _draw(K, dtype=dtype, scale=gamma)
    folded, sums = fold(weight, *norm, bias * gamma)
    exact_x = x.double()
    deviation = exact_x.var(dim=1, correction=0).add(1e-5).rsqrt()
    stats = torch.stack([exact_x.mean(dim=1), deviation], dim=1).float()
    product = Product(x, folded, stats=stats, sums=sums)

    def eager(kind: torch.dtype) -> Tensor:
        given = [one.to(kind) for one in (x, *norm, weight, bias * gamma)]
        return F.linear(F.layer_norm(given[0], (K,), *given[1:3], 1e-5), *given[3:])

    assert_as_accurate(_run(product, _WAYS[way]), eager(dtype), eager(torch.float64))


def test_folds_follow_their_weights() -> None:
    folded, weight, norm, other = FoldedWeights(), torch.randn(6, 8), torch.rand(8), torch.rand(8)
    bias, shift = torch.randn(6), torch.randn(8)
    first = folded(weight, norm, shift, bias)
    assert folded(weight, norm, shift, bias) is first
    kept = first[0].data_ptr()
    for changed in (weight, norm, shift, bias):
        changed.mul_(1.5)
        again = folded(weight, norm, shift, bias)
        assert again[0].data_ptr() == kept  # which a graph reads
        for ours, fresh in zip(again, fold(weight, norm, shift, bias), strict=True):
            assert torch.equal(ours, fresh)
    assert not torch.equal(folded(weight, other, shift, bias)[0], again[0])
    assert torch.equal(folded(weight, norm, shift, bias)[0], again[0])
    with torch.inference_mode():
        inside = folded(weight * 2, norm, shift, None)
    assert not inside[0].is_inference()
    assert len(folded._kept) == 1  # what it was of is gone


def test_parts_are_summed_in_one_order() -> None:
    product = _product(9, 20, 1024, 0, torch.float16)
    tile = replace(_WAYS["descriptors, parts"], splits=8)
    assert torch.equal(_run(product, tile), _run(product, tile))


def _cases() -> Iterator[tuple[int, int, int, int, bool]]:
    """Products of SD v1.5's steps with 1 to 16 rows."""
    for positions, C in ((4096, 320), (1024, 640), (256, 1280), (64, 1280)):
        for rows in (1, 2, 4, 16):
            M = rows * positions
            yield from ((M, 3 * C, C, 0, False), (M, C, C, 0, False), (M, C, 4 * C, C, False), (M, 4 * C, C, 0, True))


@pytest.mark.parametrize("generation", CARDS)
def test_tiles_fit_their_cards(generation: int) -> None:
    card = CARDS[generation]
    for M, N, K, K_z, gated in _cases():
        tile = best_tile(M, N, K, K_z, torch.float16, gated, card)
        assert tile.tma == has_descriptors(card) == (generation == 90)
        assert tile.shared_bytes(K, K_z, generation) < {80: 163, 86: 99, 89: 99, 90: 227}[generation] << 10
        assert not gated or tile.block_n == tile.block_n2
        assert tile.n_programs(M, N, gated) <= card.processors or not tile.tma
        every_part_has_work = (tile.splits - 1) * tile.steps(K, K_z) < replace(tile, splits=1).steps(K, K_z)
        assert every_part_has_work
        assert best_tile(M, N, K, K_z, torch.float16, gated, card, described=False).tma is False


def test_few_rows_are_split_and_many_are_not() -> None:
    card = CARDS[90]
    splits = {M: best_tile(M, 1280, 5120, 1280, torch.float16, False, card).splits for M in (64, 128, 512, 2048, 8192)}
    assert splits[64] > 4
    assert splits[128] > 4
    assert splits[512] > 1
    assert splits[2048] == splits[8192] == 1
    found = best_tile(8192, 320, 320, 0, torch.float16, False, card)
    assert (found.block_n + found.block_n2, found.n_tiles(8192, 320, False)) == (160, 128)


def test_unknown_cards_and_float32_have_tiles_too() -> None:
    for generation in (75, 100, 120):
        tile = best_tile(8192, 320, 320, 0, torch.bfloat16, False, Card(generation, 170))
        assert not tile.tma
        assert tile.shared_bytes(320, 0, generation) < 99 << 10
    for gated in (False, True):
        assert not best_tile(8192, 320, 320, 0, torch.float32, gated, CARDS[90]).tma
    assert all(tiles_of(generation, gated, False, 320, 80) for generation in CARDS for gated in (False, True))
    assert torch.float32 not in HALVES


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's own tile is taken")
@pytest.mark.parametrize(("K", "offset", "described"), [(64, 0, True), (60, 0, False), (64, 4, False)])
def test_descriptors_need_rows_at_16_bytes(K: int, offset: int, described: bool, monkeypatch: Any) -> None:
    seen = []
    monkeypatch.setattr(module, "best_tile", lambda *given: seen.append(given[-1]) or _WAYS["pointers"])
    x = torch.randn(5 * K + offset).half()[offset:].view(5, K)
    product = Product(x, torch.randn(16, K).half())
    assert_as_accurate(_run(product, None), _eager(product, torch.float16), _eager(product, torch.float64))
    assert seen == [described]
    multiply(product, x.new_empty(5, 16), tma=False)
    assert seen == [described, False]
