"""Both distances of a concept's pictures from the base's, as sums over parts that may be taken anywhere.

A part names files and numbers; who takes it reads them and gives back sums. Together they are the divergence of
``divergence.py`` and the distance of ``wasserstein.py`` over all pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine import Engine
from ..loading import load
from ..methods.concept import Concept
from ..methods.ico import ICO
from ..methods.infusion import Infusion
from .divergence import noise_predictor, pair_sums
from .wasserstein import distance_record, from_moments

Part = Callable[["Summer"], Any]
# parts and arguments of ``load`` -> the parts' sums, in order
Compute = Callable[[Sequence[Part], Mapping[str, Any]], list[Any]]
Files = tuple[Path, ...]
_PAIRS, _SAMPLES = 16, 256  # in a part


class Summer:
    """Takes parts. On Ray it lives in an actor, and only sums leave it."""

    def __init__(self, loading: Mapping[str, Any], threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.loading = loading

    def take(self, part: Part) -> Any:
        return part(self)

    @cached_property
    def sd(self) -> Engine:
        """Loaded by the first part that needs it."""
        return load(**self.loading)


def compute_here(parts: Sequence[Part], loading: Mapping[str, Any]) -> list[Any]:
    """Take the parts in this process."""
    return list(map(Summer(loading).take, parts))


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of picture and prompt, of the divergence between the base and a concept's model.

    Infusion's is its customised pipeline; ICO's tokens do nothing in a prompt without them, its keys and values do.

    Attributes:
        concept: its file.
        files: latents (4, h, w) each.
        prompts: one per file.
        numbers: of the pairs among all.
    """

    concept: Path
    files: Files
    prompts: tuple[str, ...]
    numbers: tuple[int, ...]

    def __call__(self, summer: Summer) -> Tensor:
        """See ``divergence.pair_sums``."""
        concept, sd = Concept.load(self.concept), summer.sd
        if concept.method == "infusion":
            custom: Infusion | ICO | None = Infusion([concept])
        else:
            custom = ICO([replace(concept, tokens=None)]) if concept.changes else None
        predictors = noise_predictor(sd), noise_predictor(sd, custom)
        return pair_sums(sd, *predictors, read_latents(self.files), self.prompts, [(i, 0) for i in self.numbers])


@dataclass(frozen=True, slots=True)
class Sum:
    """Of latents."""

    files: Files

    def __call__(self, _summer: Summer) -> Tensor:
        """(d,) float64."""
        return _flat(self.files).sum(dim=0)


@dataclass(frozen=True, slots=True)
class Squares:
    """Of latents' distances from their mean (d,)."""

    files: Files
    mean: Tensor

    def __call__(self, _summer: Summer) -> float:
        return float((_flat(self.files) - self.mean).square().sum())


@dataclass(frozen=True, slots=True)
class Products:
    """Of each latent of one part with each of another, both from their means (d,)."""

    files: Files
    mean: Tensor
    others: Files
    others_mean: Tensor

    def __call__(self, _summer: Summer) -> Tensor:
        """(n, m) float64."""
        return (_flat(self.files) - self.mean) @ (_flat(self.others) - self.others_mean).T


def divide_pairs(concept: Path, files: Sequence[Path], prompts: Sequence[str]) -> list[Pairs]:
    """All pairs, in the parts of which their sums (2, n) are to be put together."""
    chunks = [range(first, min(first + _PAIRS, len(files))) for first in range(0, len(files), _PAIRS)]
    return [
        Pairs(concept, tuple(files[i] for i in chunk), tuple(prompts[i] for i in chunk), tuple(chunk))
        for chunk in chunks
    ]


def distances(
    kinds: Mapping[str, Sequence[Path]],
    pairs: Sequence[tuple[str, str, str]],
    compute: Callable[[Sequence[Part]], list[Any]],
) -> list[dict[str, float]]:
    """Records of the 2-Wasserstein distance between kinds of pictures.

    Two rounds: sums give the means, and what depends on them comes after, as no variance is a difference of squares.

    Args:
        kinds: latents' files by kind, at least 2 each.
        pairs: for each record the reference, the kind that is far from it, and the kind whose distance is the floor.
        compute: takes parts.

    Raises:
        ValueError: there are too few pictures of a kind.
    """
    for kind, files in kinds.items():
        if len(files) < 2:
            raise ValueError(f"a Wasserstein distance must have at least 2 pictures of each kind, got 1 of {kind!r}")
    chunks = {kind: _chunks(files) for kind, files in kinds.items()}
    sums = iter(compute([Sum(chunk) for own in chunks.values() for chunk in own]))
    means = {kind: torch.stack([next(sums) for _ in own]).sum(dim=0) / len(kinds[kind]) for kind, own in chunks.items()}
    wanted = dict.fromkeys((one, other) for one, far, near in pairs for other in (far, near))
    squares = [Squares(chunk, means[kind]) for kind, own in chunks.items() for chunk in own]
    products = [
        Products(chunk, means[one], others, means[other])
        for one, other in wanted
        for chunk in chunks[one]
        for others in chunks[other]
    ]
    found = iter(compute([*squares, *products]))
    traces = {kind: sum(next(found) for _ in own) / (len(kinds[kind]) - 1) for kind, own in chunks.items()}
    squared = {}
    for one, other in wanted:
        rows = [torch.cat([next(found) for _ in chunks[other]], dim=1) for _ in chunks[one]]
        scale = ((len(kinds[one]) - 1) * (len(kinds[other]) - 1)) ** 0.5
        both = (means[one], means[other]), (traces[one], traces[other])
        squared[one, other] = from_moments(*both, torch.cat(rows) / scale)
    return [distance_record(squared[one, far], squared[one, near], len(kinds[far])) for one, far, near in pairs]


def read_latents(files: Sequence[Path]) -> Tensor:
    """(n, 4, h, w) float32."""
    return torch.stack([torch.from_numpy(np.load(file)).float() for file in files])


def _flat(files: Sequence[Path]) -> Tensor:
    return read_latents(files).flatten(1).double()


def _chunks(files: Sequence[Path]) -> list[Files]:
    return [tuple(files[first : first + _SAMPLES]) for first in range(0, len(files), _SAMPLES)]
