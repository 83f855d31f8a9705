"""The pictures that a request's ControlNets are told by, checked and brought to the size that is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..methods.control import Control
from .given import as_given


def make_hints(
    controls: Sequence[Control], n_prompts: int, n_images: int, size: tuple[int, int], factor: int
) -> tuple[Tensor, ...]:
    """For each control its hints (K, 3, H, W) float32 in [0, 1], where K is 1, or divides the number of images.

    As diffusers' ``control_image_processor`` makes them: Lanczos to ``size`` (height, width), and no shift to [-1, 1].
    Arrays of floats are not rounded to 8 bits.

    Raises:
        ValueError: pictures are not pictures, or too few or many; or a net's hints do not become ``factor`` times
            smaller, as the latents are.
    """
    made = []
    for control in controls:
        if control.net.control.factor != factor:
            rule = f"control {control.net.name!r} belongs to a model whose latents are {control.net.control.factor}"
            raise ValueError(f"{rule} times smaller than its pictures; this model's are {factor} times")
        pictures = as_given("the image of a control", "picture", control.image, n_prompts, n_images)
        made.append(torch.stack([_hint(picture, size) for picture in pictures]))
    return tuple(made)


def picture_of(hints: Tensor, i: int, n_images: int) -> int:
    """Which of a control's hints belongs to image ``i``."""
    return i * len(hints) // n_images


def _hint(picture: Any, size: tuple[int, int]) -> Tensor:
    """(3, H, W)."""
    rule = "the image of a control must hold PIL pictures or arrays (H, W) or (H, W, 3), uint8 or float in [0, 1]"
    if isinstance(picture, Image.Image):
        picture = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    if not isinstance(picture, np.ndarray) or not (picture.ndim == 2 or picture.shape[2:] == (3,)):
        raise ValueError(f"{rule}, got {getattr(picture, 'shape', type(picture))}")
    if picture.ndim == 2:
        picture = np.repeat(picture[..., None], 3, axis=2)
    if picture.dtype == np.uint8:
        pixels = np.asarray(_resized(Image.fromarray(picture), size), np.float32) / 255
    elif picture.dtype.kind == "f" and np.isfinite(picture).all() and picture.min() >= 0 and picture.max() <= 1:
        channels = [Image.fromarray(picture[..., c].astype(np.float32)) for c in range(3)]
        pixels = np.stack([np.asarray(_resized(one, size)) for one in channels], axis=-1).clip(0, 1)
    else:
        raise ValueError(f"{rule}, got {picture.dtype} from {picture.min()} to {picture.max()}")
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def _resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    return picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.LANCZOS)
