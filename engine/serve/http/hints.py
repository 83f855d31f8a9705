"""Hints of ControlNets brought to the size that is drawn, as A1111's extension does where a client asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from ...methods.control import Control
from ...read_picture import read_picture
from ...sampling.arguments import Options
from ...sampling.request import ModelLimits, make_request

STRETCH, CROP, FILL = "Just Resize", "Crop and Resize", "Resize and Fill"


def fit_hints(
    limits: ModelLimits, prompt: str | list[str], values: Mapping[str, Any], modes: Sequence[str]
) -> list[Control]:
    """The controls of a request with hints of the size that is drawn.

    Where the surroundings of a mask alone are drawn, the same part of the hint is taken, from the hint brought to the
    picture's size.

    Args:
        limits: of the model.
        prompt, values: of the request, whose controls have one hint each.
        modes: one per control. ``STRETCH`` it to both sides; ``CROP`` it, so that it covers both; or ``FILL`` what is
            left around it with the median of its edges.

    Raises:
        ValueError: the request cannot be honoured.
    """
    own = {name: value for name, value in values.items() if name not in ("control", "image_prompts")}
    request = make_request(limits, prompt, Options(**own))
    (height, width), crops = request.size, () if request.masked is None else request.masked.crops
    controls = []
    for control, mode in zip(values["control"], modes, strict=True):
        hint, last = read_picture(control.image), mode
        if crops:
            hint, last = fitted(hint, mode, crops[0].picture.size).crop(crops[0].box), FILL
        controls.append(replace(control, image=fitted(hint, last, (width, height))))
    return controls


def fitted(hint: Image.Image, mode: str, size: tuple[int, int]) -> Image.Image:
    """A hint "RGB" of a size (width, height)."""
    if mode == STRETCH or hint.size == size:
        return hint.resize(size, Image.Resampling.LANCZOS)
    width, height = size
    scales = width / hint.width, height / hint.height
    scale = max(scales) if mode == CROP else min(scales)
    across, down = max(1, round(hint.width * scale)), max(1, round(hint.height * scale))
    if mode == CROP:  # out of the hint itself: what is very long and narrow would become a great many pixels
        left, top = (across - width) // 2, (down - height) // 2
        x, y = hint.width / across, hint.height / down
        box = left * x, top * y, min((left + width) * x, hint.width), min((top + height) * y, hint.height)
        return hint.resize(size, Image.Resampling.LANCZOS, box)
    whole = Image.new("RGB", size, _edges_median(hint))
    whole.paste(hint.resize((across, down), Image.Resampling.LANCZOS), ((width - across) // 2, (height - down) // 2))
    return whole


def _edges_median(hint: Image.Image) -> tuple[int, int, int]:
    pixels = np.asarray(hint)
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    red, green, blue = np.median(edges, axis=0).astype(int)
    return int(red), int(green), int(blue)
