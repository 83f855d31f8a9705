"""Pictures from files or memory, upright and of a size that can be meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

_MAX_PIXELS = 64_000_000


def read_picture(picture: Any, mode: str = "RGB") -> Image.Image:
    """A picture, turned as its EXIF orientation says.

    Args:
        picture: a file's path, a PIL picture, or an array (H, W) or (H, W, 3) uint8.
        mode: PIL's, such as "RGB" or "L".

    Raises:
        ValueError: it is none of these, cannot be read, or is too large.
    """
    if isinstance(picture, Image.Image):
        _check_size(picture, "a picture")
        return ImageOps.exif_transpose(picture).convert(mode)
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3):
            raise ValueError(f"arrays must be uint8 (H, W, 3), got {picture.dtype} of shape {picture.shape}")
        return Image.fromarray(picture).convert(mode)
    if not isinstance(picture, str | Path):
        raise ValueError(f"pictures must be files, PIL pictures or arrays, got {picture!r}")
    try:
        with Image.open(picture) as file:
            _check_size(file, str(picture))
            return ImageOps.exif_transpose(file).convert(mode)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{picture}: cannot be read as a picture: {error}") from error


def _check_size(picture: Image.Image, name: str) -> None:
    if picture.width * picture.height > _MAX_PIXELS:
        raise ValueError(f"{name} must have at most {_MAX_PIXELS} pixels, got {picture.width}x{picture.height}")
