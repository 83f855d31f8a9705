"""Pictures on one sheet."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image


def grid(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Paste pictures of one size into a white sheet, row by row."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet
