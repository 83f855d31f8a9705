"""Masks of pictures: read, softened, fitted to what is drawn; crops around them, and pasting back what was drawn.

Sizes, crops and pixels are those of diffusers' ``VaeImageProcessor``, so that both draw and return the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from .arguments import Options
from .given import as_given, one_per_image

HALF = 0.5  # from here on a mask counts as redrawn where it must be hard
_LANCZOS = Image.Resampling.LANCZOS
_MODES = ("1", "L", "P", "RGB", "LA", "RGBA", "PA")

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


@dataclass(frozen=True, slots=True)
class Crop:
    """What was cut out of a picture to be drawn by itself.

    Attributes:
        picture: whole, as it was given.
        mask: (W, H) of the picture, "L".
        box: what of it is drawn.
    """

    picture: Image.Image
    mask: Image.Image
    box: Box

    def paste(self, drawn: Image.Image) -> Image.Image:
        """The whole picture with ``drawn`` in its box, as far as the mask goes."""
        left, top, right, bottom = self.box
        size = right - left, bottom - top
        scaled, offset = _scaled(drawn, *size, inside=False)
        patch, whole = Image.new("RGB", size), self.picture.copy()
        patch.paste(scaled, offset)
        whole.paste(patch, (left, top))
        return Image.composite(whole, self.picture, self.mask)


@dataclass(frozen=True, slots=True)
class Masked:
    """What of a request's pictures is redrawn.

    Attributes:
        masks: (I, 1, H, W) float32 in [0, 1], 1 where they are redrawn.
        tells: whether the UNet has channels for masks and masked pictures.
        crops: of each image, where the surroundings of its mask alone are drawn; else none.
    """

    masks: Tensor
    tells: bool
    crops: tuple[Crop, ...] = ()

    def finished(self, i: int, drawn: Any) -> Any:
        """Image ``i`` as it is returned."""
        return self.crops[i].paste(drawn) if self.crops else drawn


def check_mask(options: Options, takes_masks: bool) -> None:
    """Refuse options that do not go with a mask, or its absence; ``takes_masks`` is whether the UNet needs one."""
    if options.mask is None:
        for name, value in (("mask_blur", options.mask_blur or None), ("mask_padding", options.mask_padding)):
            if value is not None:
                raise ValueError(f"{name} belongs to a mask: give one too, got {name}={value}")
        if takes_masks:
            rule = "this is an inpainting model, whose UNet sees a picture and its mask: give image and mask"
            raise ValueError(f"{rule} (a white mask redraws all of it), got no mask")
    elif options.image is None:
        raise ValueError("mask says what of a picture to redraw: give image too")
    elif options.mask_padding is not None and options.output != "pil":
        rule = "mask_padding pastes what is drawn into the whole picture: output must be 'pil'"
        raise ValueError(f"{rule}, got {options.output!r}")


def read_masks(options: Options, n_prompts: int) -> list[Image.Image]:
    """The masks given, one per picture to draw, in mode "1" or "L", blurred where that is asked for."""
    n_images = n_prompts * options.images_per_prompt
    masks = [_read(mask) for mask in as_given("mask", "mask", options.mask, n_prompts, n_images, own_axes=None)]
    if options.mask_blur:
        masks = [mask.convert("L").filter(ImageFilter.GaussianBlur(options.mask_blur)) for mask in masks]
    return one_per_image(masks, n_images)


def cut(
    options: Options, pictures: Sequence[Image.Image], masks: Sequence[Image.Image], size: tuple[int, int]
) -> tuple[list[Image.Image], Tensor, tuple[Crop, ...]]:
    """Fit pictures and masks, one each per image, to the height and width that are drawn.

    Returns:
        Pictures, which are not resized unless they are cropped, masks (I, 1, H, W) float32, and the crops.
    """
    height, width = size
    if options.mask_padding is None:
        fitted = [mask.resize((width, height), _LANCZOS) for mask in masks]
        return list(pictures), _tensor(masks, fitted), ()
    for picture, mask in zip(pictures, masks, strict=True):
        if picture.size != mask.size:
            rule = "mask must be as large as its picture where mask_padding cuts out of both"
            raise ValueError(f"{rule}, got {mask.width}x{mask.height} for {picture.width}x{picture.height}")
    boxes = [crop_box(mask, width, height, options.mask_padding) for mask in masks]
    pairs = list(zip(pictures, masks, boxes, strict=True))
    fitted = [_fitted(mask.crop(box), width, height) for _, mask, box in pairs]
    crops = tuple(Crop(picture, mask.convert("L"), box) for picture, mask, box in pairs)
    return [_fitted(picture.crop(box), width, height) for picture, _, box in pairs], _tensor(masks, fitted), crops


def crop_box(mask: Image.Image, width: int, height: int, padding: int) -> Box:
    """What a mask marks and ``padding`` pixels around it, grown to the shape of ``width`` x ``height``.

    It stays within the picture; where that is too narrow for the shape, it has another.
    """
    marked = np.asarray(mask.convert("L")) > 0
    columns, rows = (np.flatnonzero(marked.any(axis=axis)) for axis in (0, 1))
    left, right = max(int(columns[0]) - padding, 0), min(int(columns[-1]) + 1 + padding, mask.width)
    top, bottom = max(int(rows[0]) - padding, 0), min(int(rows[-1]) + 1 + padding, mask.height)
    shape = width / height
    if (right - left) / (bottom - top) > shape:
        top, bottom = _grown(top, bottom, int((right - left) / shape - (bottom - top)), mask.height)
    else:
        left, right = _grown(left, right, int((bottom - top) * shape - (right - left)), mask.width)
    return left, top, right, bottom


def _grown(low: int, high: int, missing: int, size: int) -> tuple[int, int]:
    """A range grown on both sides, and moved into 0 to ``size``."""
    low, high = low - missing // 2, high + missing - missing // 2
    beyond = max(0, high - size)
    low, high = low - beyond, high - beyond
    return max(0, low), min(size, high + max(0, -low))


def _read(mask: Any) -> Image.Image:
    rule = "mask must hold PIL pictures or arrays (H, W), uint8, bool or float in [0, 1]"
    if isinstance(mask, Image.Image):
        upright = ImageOps.exif_transpose(mask)
        if upright.mode not in _MODES:
            raise ValueError(f"{rule}, got a picture of mode {upright.mode!r}")
        if upright.has_transparency_data and upright.convert("RGBA").getextrema()[3][0] < 255:  # type: ignore[index]
            raise ValueError("mask must be opaque, white where to redraw; got transparent pixels")
        upright = upright if upright.mode == "1" else upright.convert("L")
    elif not isinstance(mask, np.ndarray) or mask.ndim != 2:
        raise ValueError(f"{rule}, got {getattr(mask, 'shape', type(mask))}")
    elif mask.dtype in (np.uint8, bool):
        upright = Image.fromarray(mask)
    elif mask.dtype.kind != "f" or not np.isfinite(mask).all() or mask.min() < 0 or mask.max() > 1:
        raise ValueError(f"{rule}, got {mask.dtype} from {mask.min()} to {mask.max()}")
    else:
        upright = Image.fromarray((mask * 255).round().astype(np.uint8))
    if not upright.getbbox():
        raise ValueError("mask must mark something to redraw, got one that is black everywhere")
    return upright


def _tensor(masks: Sequence[Image.Image], fitted: Sequence[Image.Image]) -> Tensor:
    """Fitted masks as (I, 1, H, W) float32; those of black and white alone stay so."""
    values = []
    for mask, one in zip(masks, fitted, strict=True):
        value = np.asarray(one.convert("L")).astype(np.float32) / 255
        is_hard = not any(mask.convert("L").histogram()[1:255])
        values.append((value >= HALF).astype(np.float32) if is_hard else value)
    return torch.from_numpy(np.stack(values))[:, None]


def _fitted(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Scaled to lie inside ``width`` x ``height``, in the middle; the rest continues the edges."""
    scaled, (left, top) = _scaled(picture, width, height, inside=True)
    whole = Image.new(picture.mode, (width, height))
    whole.paste(scaled, (left, top))
    right, bottom = scaled.size
    if top:
        for edge, place in ((0, 0), (bottom, top + bottom)):
            whole.paste(scaled.resize((width, top), box=(0, edge, right, edge)), (0, place))
    if left:
        for edge, place in ((0, 0), (right, left + right)):
            whole.paste(scaled.resize((left, height), box=(edge, 0, edge, bottom)), (place, 0))
    return whole


def _scaled(picture: Image.Image, width: int, height: int, inside: bool) -> tuple[Image.Image, tuple[int, int]]:
    """A picture of its own shape that fits into, or covers, ``width`` x ``height``; and where it begins there."""
    wide, high = picture.width * height, picture.height * width
    by_width = wide > high if inside else wide < high
    size = (width, high // picture.width) if by_width else (wide // picture.height, height)
    return picture.resize(size, _LANCZOS), (width // 2 - size[0] // 2, height // 2 - size[1] // 2)
