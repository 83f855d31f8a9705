"""Figures of studies, with headings that can be read (needs the ``plots`` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl  # pyright: ignore[reportMissingImports]
import numpy as np
from matplotlib import pyplot as plt  # pyright: ignore[reportMissingImports]
from PIL import Image

from engine.observe.masks import BranchMasks

mpl.use("agg")
_FONT_PT = 12
_DPI = 100


def pictures_figure(
    rows: Sequence[Sequence[Image.Image]], row_names: Sequence[str], column_names: Sequence[str], title: str, path: Path
) -> None:
    """Pictures in rows and columns that are named in words."""
    n_columns = len(column_names)
    size = (1.9 * n_columns + 0.6, 1.95 * len(rows) + 0.9)
    figure, axes = plt.subplots(len(rows), n_columns, figsize=size, squeeze=False, layout="constrained")
    figure.suptitle(title, fontsize=_FONT_PT + 1)
    for axis, name in zip(axes[0], column_names, strict=True):
        axis.set_title(name, fontsize=_FONT_PT)
    for row, pictures, name in zip(axes, rows, row_names, strict=True):
        row[0].set_ylabel(name, fontsize=_FONT_PT)
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture)
            _without_ticks(axis)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def masks_figure(picture: Image.Image, masks: BranchMasks, title: str, path: Path) -> None:
    """A picture and its masks at every scale, in multiples of uniform attention, on one colour scale.

    Means over steps, heads and the layers of a scale; a mask sums to 1, so that times its N positions it is 1 where
    attention is uniform.
    """
    maps = {}
    for h, w in masks.sizes:
        layers = [one.mean(axis=(0, 1)) for one in masks.layers.values() if one.shape[-2:] == (h, w)]
        maps[h, w] = h * w * np.mean(layers, axis=0)
    most = max(float(one.max()) for one in maps.values())
    size = (3.1 * (len(maps) + 1) + 0.9, 4.0)
    figure, axes = plt.subplots(1, len(maps) + 1, figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=_FONT_PT + 1)
    axes[0].imshow(picture)
    axes[0].set_title("the picture", fontsize=_FONT_PT)
    _without_ticks(axes[0])
    shown = None
    for axis, ((h, w), one) in zip(axes[1:], maps.items(), strict=True):
        shown = axis.imshow(one, vmin=0.0, vmax=most, cmap="viridis", extent=(0, 1, 1, 0), interpolation="nearest")
        heading = f"layers of {h} x {w} positions\n{one.min():.2f} to {one.max():.1f}"
        axis.set_title(heading, fontsize=_FONT_PT)
        _without_ticks(axis)
    assert shown is not None
    bar = figure.colorbar(shown, ax=axes, shrink=0.85, pad=0.01)
    bar.set_label("attention, in multiples of uniform\n(mask x number of positions)", fontsize=_FONT_PT)
    bar.ax.tick_params(labelsize=_FONT_PT)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def _without_ticks(axis: plt.Axes) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
