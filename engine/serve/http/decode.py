"""Pictures and masks as clients send them."""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from collections.abc import Callable

from PIL import Image, ImageOps, UnidentifiedImageError

MaskReader = Callable[[Image.Image], Image.Image | None]


def decoded(name: str, text: str, most_pixels: int) -> Image.Image:
    """A picture from base64, which may be a data URL; nothing is fetched, and no bomb is unpacked."""
    head, _, tail = text.partition(",")
    try:
        data = base64.b64decode(tail if head.startswith("data:") else text, validate=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP", "GIF", "BMP"))
            if picture.width * picture.height > 16 * most_pixels:
                size = f"{picture.width}x{picture.height}"
                raise ValueError(f"{name} must have at most {16 * most_pixels} pixels on this server, got {size}")
            picture.load()
    except binascii.Error as error:
        raise ValueError(f"{name} must be a picture in base64: {error}") from error
    except (
        UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning,
    ) as error:  # fmt: skip
        raise ValueError(f"{name} must be a PNG, JPEG, WebP, GIF or BMP file: {error}") from error
    return picture


def as_it_is(picture: Image.Image) -> Image.Image:
    """A mask that is one: white where to redraw."""
    return picture


def from_transparency(picture: Image.Image) -> Image.Image:
    """OpenAI's masks: where a picture is transparent it is redrawn.

    Raises:
        ValueError: it is opaque everywhere.
    """
    mask = transparency(picture)
    if mask is None:
        raise ValueError("mask must have transparent pixels, which say what to redraw; it is opaque everywhere")
    return mask


def transparency(picture: Image.Image) -> Image.Image | None:
    """A picture's transparent pixels as a mask; None where it has none."""
    if not picture.has_transparency_data:
        return None
    alpha = picture.convert("RGBA").getchannel("A")
    return None if alpha.getextrema()[0] == 255 else ImageOps.invert(alpha)


def black_and_white(inverted: bool) -> MaskReader:
    """A1111's masks: opacity counts where a picture is transparent somewhere, else brightness; cut at 128."""

    def read(picture: Image.Image) -> Image.Image:
        clear = transparency(picture)
        grey = picture.convert("L") if clear is None else ImageOps.invert(clear)
        return grey.point([255 * ((value > 128) != inverted) for value in range(256)])

    return read
