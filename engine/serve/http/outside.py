"""What clients expect of a picture outside of its mask: that it is the one they sent."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image

from ...read_picture import read_picture
from ...sampling.arguments import Options
from ...sampling.mask import Crop, read_masks

Finish = Callable[[Image.Image], Image.Image]
Covering = Callable[[int], int]  # from a mask's value to how much of it is what was drawn, both 0 to 255


def as_masked(value: int) -> int:
    """As far as the mask goes."""
    return value


def doubled(value: int) -> int:
    """A1111's, where it draws whole pictures: a blurred mask's inner half is drawn wholly, its outer half blends."""
    return min(2 * value, 255)


def keep_outside(picture: Image.Image, mask: Image.Image, blur: float, covering: Covering) -> Finish:
    """Lays what is drawn over the picture it began with, where the mask is; elsewhere the picture stays, to the bit.

    A picture that is not of the size that is drawn is brought to it first, as ``generate`` does.

    Args:
        picture: upright as its EXIF orientation says.
        mask: as ``generate`` takes it.
        blur: its ``mask_blur``.
        covering: of the blurred mask's values.
    """
    picture = read_picture(picture)
    (softened,) = read_masks(Options(mask=mask, mask_blur=blur), 1)
    softened = softened.convert("L").point([covering(value) for value in range(256)])

    def finish(drawn: Image.Image) -> Image.Image:
        nonlocal picture, softened  # all that a request draws is of one size, and results are kept for a while
        picture, softened = _sized(picture, drawn.size), _sized(softened, drawn.size)
        return Crop(picture, softened, (0, 0, *drawn.size)).paste(drawn)

    return finish


def _sized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
