"""A pen that draws closed paths, given on a 100 x 100 grid (y down), onto a Pillow image.

Paths are ``(N, 2)`` arrays built once by the cached helpers below. The pen moves them with one affine map and
draws the outlines of a group of paths first and their fills second, so that the group gets a single silhouette.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.tinyworld.palette import RGB, Paint

Path = np.ndarray
Pattern = tuple[tuple[Path, RGB], ...]
Point = tuple[float, float]


def _catmull_rom(points: np.ndarray, closed: bool, n_steps: int = 5) -> np.ndarray:
    """Sample a Catmull-Rom spline through ``(N, 2)`` points, ``n_steps`` samples a segment."""
    padded = np.vstack([points[-1:], points, points[:2]] if closed else [points[:1], points, points[-1:]])
    p0, p1, p2, p3 = (padded[i : len(padded) - 3 + i, None] for i in range(4))
    t = (np.arange(n_steps) / n_steps)[None, :, None]
    cubic = 2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3
    samples = (cubic / 2).reshape(-1, 2)
    return samples if closed else np.vstack([samples, points[-1:]])


@cache
def polygon(*points: Point) -> Path:
    """Straight-edged path."""
    return np.array(points, dtype=float)


@cache
def curve(*points: Point) -> Path:
    """Smooth closed path through ``points``."""
    return _catmull_rom(np.array(points, dtype=float), closed=True)


@cache
def ellipse(x: float, y: float, rx: float, ry: float, degrees: float = 0.0) -> Path:
    """Ellipse about ``(x, y)``, turned clockwise by ``degrees``."""
    angles = np.linspace(0, 2 * math.pi, 16 if max(rx, ry) < 8 else 32, endpoint=False)
    circle = np.stack([rx * np.cos(angles), ry * np.sin(angles)], axis=1)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return circle @ np.array([[c, s], [-s, c]]) + (x, y)


@cache
def sector(x: float, y: float, radius: float, start: float, stop: float) -> Path:
    """Slice of a disc between two angles in degrees."""
    angles = np.radians(np.linspace(start, stop, 12))
    arc = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius + (x, y)
    return np.vstack([arc, (x, y)])


@cache
def rounded(x0: float, y0: float, x1: float, y1: float, radius: float) -> Path:
    """Rectangle with round corners."""
    left, right, top, bottom = x0 + radius, x1 - radius, y0 + radius, y1 - radius
    corners = [(right, bottom), (left, bottom), (left, top), (right, top)]
    angles = np.linspace(0, math.pi / 2, 5)
    arcs = []
    for quarter, corner in enumerate(corners):
        turned = angles + quarter * math.pi / 2
        arcs.append(np.stack([np.cos(turned), np.sin(turned)], axis=1) * radius + corner)
    return np.concatenate(arcs)


@cache
def tube(width: float, *points: Point, taper: float = 1.0) -> Path:
    """Smooth stroke through ``points``, ``width`` wide at its start and ``taper * width`` at its round end."""
    line = _catmull_rom(np.array(points, dtype=float), closed=False)
    direction = np.gradient(line, axis=0)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    normal = np.stack([-direction[:, 1], direction[:, 0]], axis=1)
    half = np.linspace(width / 2, taper * width / 2, len(line))[:, None]
    turn = np.linspace(math.pi / 2, -math.pi / 2, 7)[1:-1, None]
    end = line[-1] + half[-1] * (np.cos(turn) * direction[-1] + np.sin(turn) * normal[-1])
    start = line[0] - half[0] * (np.cos(turn) * direction[0] + np.sin(turn) * normal[0])
    return np.concatenate([line + half * normal, end, (line - half * normal)[::-1], start])


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a 100 x 100 grid lands on the canvas, in canvas pixels.

    Attributes:
        x, y: where the grid's bottom centre goes.
        scale_x, scale_y: canvas pixels per grid unit; a negative ``scale_x`` mirrors.
        degrees: clockwise turn about the bottom centre.
    """

    x: float
    y: float
    scale_x: float
    scale_y: float
    degrees: float = 0.0

    def matrix(self) -> np.ndarray:
        """The ``(2, 2)`` map for row vectors measured from the grid's bottom centre."""
        c, s = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        return np.diag([self.scale_x, self.scale_y]) @ np.array([[c, s], [-s, c]])


class Pen:
    """Draws one object in its own frame.

    Attributes:
        paint: the object's colours.
        pattern: paths drawn over every ``body``, clipped to it; empty for ordinary objects.
    """

    def __init__(self, image: Image.Image, frame: Frame, paint: Paint, pattern: Pattern = ()) -> None:
        self._image = image
        self._draw = ImageDraw.Draw(image)
        self._matrix = frame.matrix()
        self._origin = np.array([frame.x, frame.y]) - np.array([50.0, 100.0]) @ self._matrix
        self._outline_px = 2 * round(2.2 + 0.6 * frame.scale_y)
        self.paint = paint
        self.pattern = pattern

    def _place(self, path: Path) -> list[float]:
        return (path @ self._matrix + self._origin).ravel().tolist()

    def shape(self, *paths: Path, fill: RGB | None = None, outline: bool = True) -> None:
        """Fill ``paths`` as one silhouette, in the base colour unless told otherwise."""
        placed = [self._place(path) for path in paths]
        if outline:
            for points in placed:
                self._stroke(points + points[:2], self._outline_px)
        ink = self.paint.base if fill is None else fill
        for points in placed:
            self._draw.polygon(points, fill=ink)

    def body(self, *paths: Path) -> None:
        """A silhouette that carries the object's pattern."""
        self.shape(*paths)
        if not self.pattern:
            return
        mask = Image.new("L", self._image.size)
        for path in paths:
            ImageDraw.Draw(mask).polygon(self._place(path), fill=255)
        layer = self._image.copy()
        for path, colour in self.pattern:
            ImageDraw.Draw(layer).polygon(self._place(path), fill=self.paint.ink(colour))
        self._image.paste(layer, mask=mask)

    def line(self, *points: Point, width: float = 0.5) -> None:
        """Thin line in the outline's colour; ``width`` is in outlines."""
        self._stroke(self._place(polygon(*points)), max(2, round(width * self._outline_px)))

    def dot(self, x: float, y: float, radius: float, fill: RGB) -> None:
        """Small disc without an outline."""
        self.shape(ellipse(x, y, radius, radius), fill=fill, outline=False)

    def eye(self, x: float, y: float, radius: float = 5.0) -> None:
        """White eye that looks ahead."""
        self.shape(ellipse(x, y, radius, radius * 1.1), fill=(255, 255, 255), outline=False)
        self.dot(x + 0.25 * radius, y, 0.66 * radius, (25, 25, 30))

    def _stroke(self, points: list[float], width: int) -> None:
        self._draw.line(points, fill=self.paint.outline, width=width)
        if len(points) <= 20:  # few points are sharp corners; dense curves have no visible gaps
            r = width / 2 - 0.5
            for x, y in zip(points[::2], points[1::2], strict=True):
                self._draw.ellipse((x - r, y - r, x + r, y + r), fill=self.paint.outline)
