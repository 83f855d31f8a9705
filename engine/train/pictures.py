"""Reference pictures of a concept: from files or memory to cached latents, and which of them each step sees."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..engine import Engine
from ..read_picture import read_picture
from ..sampling.seeds import make_generator

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_FLIP_PROBABILITY = 0.5


@dataclass(frozen=True, slots=True)
class Batch:
    """Latents (B, 4, h, w) as the UNet sees them, loss weights (B, 1, h, w) or None, and which pictures they are of."""

    latents: Tensor
    weights: Tensor | None
    pictures: tuple[int, ...]


class Pictures:
    """Reference pictures as the VAE's posteriors, plain and mirrored, encoded once.

    Args:
        sd: whose VAE encodes them.
        images: a folder, or a list of files, PIL pictures or arrays (H, W, 3); cropped to their middle square.
        masks: a folder with a greyscale picture of the same stem for each file, or a list of pictures; None for none.
        size: side in pixels, a multiple of the VAE's factor.

    Attributes:
        digest: tells these pictures and masks from others.

    Raises:
        ValueError: there is no picture, one cannot be read or is too large, or masks do not match.
    """

    def __init__(self, sd: Engine, images: Any, masks: Any, size: int) -> None:
        given = _list(images, "images")
        squares = [_square(read_picture(picture), size) for picture in given]
        pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 127.5 - 1
        self.n_pictures = len(squares)
        self.digest = _digest(pixels)
        self.posteriors = []  # plain and mirrored: mean and standard deviation, both (n, 4, h, w) float32
        for view in (pixels, pixels.flip(-1)):
            rows = [sd.vae.posterior(row.to(sd.device)) for row in view.split(1)]
            mean, std = (torch.cat(parts).float() * sd.vae.config.scaling_factor for parts in zip(*rows, strict=True))
            if not torch.isfinite(mean).all():
                raise ValueError(f"the VAE produced NaN or infinity for the pictures in {sd.dtype}; load in float32")
            self.posteriors.append((mean, std))
        self.weights = None if masks is None else _weights(given, masks, size, sd.vae.config.factor).to(sd.device)
        if self.weights is not None:
            self.digest = _digest(pixels, self.weights.cpu())

    def batch(self, seed: int, position: int, count: int) -> Batch:
        """Pictures ``position`` to ``position + count`` of an endless sequence of shuffled rounds, half mirrored."""
        latents, weights, pictures = [], [], []
        for at in range(position, position + count):
            n_round, i = divmod(at, self.n_pictures)
            order = torch.randperm(self.n_pictures, generator=make_generator(seed, 0, n_round))
            picture, generator = int(order[i]), make_generator(seed, 1, at)
            mirrored = float(torch.rand((), generator=generator)) < _FLIP_PROBABILITY
            mean, std = (part[picture] for part in self.posteriors[mirrored])
            pictures.append(picture)
            latents.append(mean + std * torch.randn(mean.shape, generator=generator).to(mean.device))
            if self.weights is not None:
                weights.append(self.weights[picture].flip(-1) if mirrored else self.weights[picture])
        return Batch(torch.stack(latents), torch.stack(weights) if weights else None, tuple(pictures))


def _digest(*tensors: Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(str(tuple(tensor.shape)).encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def _list(images: Any, name: str) -> list[Any]:
    if isinstance(images, str | Path):
        folder = Path(images)
        if not folder.is_dir():
            raise ValueError(f"{name} must be a folder of pictures or a list, got {str(images)!r}")
        images = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
        if not images:
            raise ValueError(f"{name} must hold at least one of {', '.join(_SUFFIXES)}; {folder} has none")
    if not isinstance(images, list | tuple) or not images:
        raise ValueError(f"{name} must be a folder of pictures or a non-empty list, got {images!r}")
    return list(images)


def _square(picture: Image.Image, size: int) -> np.ndarray:
    return np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS))


def _weights(given: Sequence[Any], masks: Any, size: int, factor: int) -> Tensor:
    """(n, 1, h, w) in [0, 1]: how much of each latent position a mask covers."""
    if isinstance(masks, str | Path):
        stems = [Path(picture).stem for picture in given if isinstance(picture, str | Path)]
        found = {path.stem: path for path in _list(masks, "masks")}
        if missing := [stem for stem in stems if stem not in found]:
            raise ValueError(f"masks must have a picture for every reference picture; {masks} lacks {missing[0]!r}")
        masks = [found[stem] for stem in stems]
    masks = _list(masks, "masks")
    if len(masks) != len(given):
        raise ValueError(f"masks must be one per picture ({len(given)}), got {len(masks)}")
    pixels = torch.from_numpy(np.stack([_square(read_picture(mask, "L"), size) for mask in masks]))
    weights = torch.nn.functional.avg_pool2d(pixels[:, None].float() / 255, factor)
    for mask, weight in zip(masks, weights, strict=True):
        if not weight.any():
            raise ValueError(f"masks must mark something, got an empty one: {mask}")
    return weights
