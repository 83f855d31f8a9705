"""How a product is cut into tiles: what each generation of cards has, and a rough time of each way to cut.

The times come from the rates of the matrix instructions and of the second-level cache, to compare tiles with one
another and not to predict anything: calibration compares what they lead to with torch's products on the card itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from .jit import cdiv, next_power_of_2


@dataclass(frozen=True, slots=True)
class Card:
    """What products depend on: generation (80, 86, 89, 90, ...) and number of multiprocessors."""

    generation: int
    processors: int


@dataclass(frozen=True, slots=True)
class Rates:
    """Of one multiprocessor of a generation.

    Attributes:
        products: of half precision, summed in float32, in a cycle.
        cache_bytes: from the second-level cache in a cycle; rough.
        shared_bytes: that a program may have of the memory on the chip.
    """

    products: int
    cache_bytes: int
    shared_bytes: int


_RATES = {
    80: Rates(1024, 32, 163 << 10),
    86: Rates(256, 24, 99 << 10),
    89: Rates(256, 32, 99 << 10),
    90: Rates(2048, 40, 227 << 10),
}
_UNKNOWN = Rates(512, 32, 99 << 10)
CARDS = {80: Card(80, 108), 86: Card(86, 84), 89: Card(89, 128), 90: Card(90, 132)}  # for where there is none
_TMA = 90  # the generation that its form is compiled and looked at for
_TILE_CYCLES = 1500  # that a tile takes beside its products
_LAUNCH_CYCLES = 3000  # of another kernel, that sums
_MOST_SPLITS = 16
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Tile:
    """A way to compute a product; see ``product.multiply``.

    Attributes:
        block_m: rows.
        block_n, block_n2: columns, in one or two powers of two; for GEGLU, both of its halves'.
        block_k: of the inner axis, in a step.
        n_warps, n_stages: as Triton has them.
        tma: whether tiles come through descriptors, and one program takes many.
        splits: parts of the inner axis.
        programs: how many there may be at a time, if ``tma``.
    """

    block_m: int
    block_n: int
    block_n2: int
    block_k: int
    n_warps: int
    n_stages: int
    tma: bool = False
    splits: int = 1
    programs: int = 1

    def constants(self) -> dict[str, Any]:
        """Arguments of a launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_N2": self.block_n2,
            "BLOCK_K": self.block_k,
            "TMA": self.tma,
            "num_warps": self.n_warps,
            "num_stages": self.n_stages,
        }

    def block_z(self, K: int, K_z: int) -> int:
        """A step's part of a second input: so much that both are through at about the same time."""
        return min(self.block_k, max(16, next_power_of_2(cdiv(K_z * self.block_k, K)))) if K_z else 0

    def steps(self, K: int, K_z: int) -> int:
        """Of one part of the inner axis."""
        both = max(cdiv(K, self.block_k), cdiv(K_z, self.block_z(K, K_z)) if K_z else 0)
        return cdiv(both, self.splits)

    def is_even(self, K: int, K_z: int) -> bool:
        """Whether no step reaches beyond an input."""
        n = self.steps(K, K_z) * self.splits
        return n * self.block_k == K and n * self.block_z(K, K_z) == K_z

    def shared_bytes(self, K: int, K_z: int, generation: int) -> int:
        """At most, in half precision: the steps that are under way and, where others come in meanwhile, a sum.

        Before Hopper, the step that is computed is in registers.
        """
        columns, n_steps = self.block_n + self.block_n2, self.n_stages - (generation < _TMA)
        step = (self.block_m + columns) * (self.block_k + self.block_z(K, K_z))
        return 2 * n_steps * step + (4 * self.block_m * self.block_n if self.tma else 0)

    def n_tiles(self, M: int, N: int, gated: bool) -> int:
        return cdiv(M, self.block_m) * cdiv(N, self.block_n + (0 if gated else self.block_n2))

    def n_programs(self, M: int, N: int, gated: bool) -> int:
        found = self.n_tiles(M, N, gated) * self.splits
        return min(found, self.programs) if self.tma else found

    def cycles(self, M: int, N: int, K: int, K_z: int, gated: bool, card: Card) -> float:
        """About how long it takes."""
        rates, columns = _RATES.get(card.generation, _UNKNOWN), self.block_n + self.block_n2
        depth = self.block_k + self.block_z(K, K_z)
        step = max(
            self.block_m * columns * depth / rates.products, 2 * (self.block_m + columns) * depth / rates.cache_bytes
        )
        rounds = cdiv(self.n_tiles(M, N, gated) * self.splits, card.processors)
        found = rounds * (self.steps(K, K_z) * step + _TILE_CYCLES)
        if self.splits > 1:
            moved = 8 * self.splits * M * N * (2 if gated else 1)  # written and read again
            found += moved / (rates.cache_bytes * card.processors) + _LAUNCH_CYCLES
        return found


# Columns of 160 = 128 + 32 and 80 = 64 + 16, or one power of two; a GEGLU's values and gates. Few, since each is
# compiled for everything that may follow it, and calibration has little time.
_PLAIN = ((128, 128, 32), (128, 128, 0), (64, 128, 32), (64, 64, 16))
_GATED = ((128, 128, 128), (128, 64, 64), (64, 64, 64))
_STEPS = ((64, 4), (64, 3), (32, 4), (32, 3))  # of the inner axis, and how many are under way: the first that fits
_RESERVED = 2048  # bytes, for barriers and what the driver takes
_FLOAT32, _FLOAT32_GATED = Tile(64, 64, 0, 32, 4, 2), Tile(64, 32, 32, 32, 4, 2)


def tiles_of(generation: int, gated: bool, tma: bool, K: int, K_z: int) -> list[Tile]:
    """The tiles in half precision that a generation has room for."""
    found, room = [], _RATES.get(generation, _UNKNOWN).shared_bytes - _RESERVED
    for block_m, block_n, block_n2 in _GATED if gated else _PLAIN:
        if block_n + block_n2 > 160 and not tma:
            continue  # a processor's registers hold no more beside what copies take
        for block_k, stages in _STEPS:
            tile = Tile(block_m, block_n, block_n2, block_k, 8 if block_m == 128 else 4, stages, tma)
            if tile.shared_bytes(K, K_z, generation) <= room:
                found.append(tile)
                break
    return found


@cache
def best_tile(
    M: int, N: int, K: int, K_z: int, dtype: torch.dtype, gated: bool, card: Card, described: bool = True
) -> Tile:
    """The tile of the least ``Tile.cycles``.

    Args:
        M, N, K, K_z: rows, columns of the result, inner size, and that of the second input.
        dtype: of inputs.
        gated: for GEGLU.
        card: which.
        described: whether descriptors may be used; Hopper cards have them.
    """
    if dtype not in HALVES:
        return _FLOAT32_GATED if gated else _FLOAT32
    tma = described and has_descriptors(card)
    found = [
        replace(tile, splits=n, programs=card.processors)
        for tile in tiles_of(card.generation, gated, tma, K, K_z)
        for n in range(1, _MOST_SPLITS + 1)
        if n == 1 or (n - 1) * cdiv(tile.steps(K, K_z), n) < tile.steps(K, K_z)
    ]
    return min(found, key=lambda tile: (tile.cycles(M, N, K, K_z, gated, card), tile.splits))


def has_descriptors(card: Card) -> bool:
    """Whether tiles may come through descriptors."""
    return card.generation == _TMA


@cache
def _card_of(index: int) -> Card:
    found = torch.cuda.get_device_properties(index)
    return Card(10 * found.major + found.minor, found.multi_processor_count)


def card_of(device: torch.device) -> Card:
    """A device's card; where there is none, as in the interpreter, a Hopper one."""
    if device.type != "cuda":
        return CARDS[_TMA]
    return _card_of(torch.cuda.current_device() if device.index is None else device.index)
