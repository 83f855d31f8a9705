"""Patterns on objects' bodies: what custom concepts are made of."""

import math
from collections.abc import Callable

from benchmarks.tinyworld.palette import RGB
from benchmarks.tinyworld.pen import Path, Pattern, ellipse, polygon, tube


def _stripes(colour: RGB) -> Pattern:
    bars = (tube(7, (x, 2), (x - 8, 30), (x + 2, 64), (x - 8, 100)) for x in range(34, 100, 15))
    return tuple((bar, colour) for bar in bars)


def _checks(colour: RGB, side: int = 11) -> Pattern:
    squares = []
    for row in range(5):
        for column in range(7):
            x, y = 8 + column * side, 42 + row * side
            if (row + column) % 2 == 0:
                squares.append((polygon((x, y), (x + side, y), (x + side, y + side), (x, y + side)), colour))
    return tuple(squares)


def _spots(colour: RGB) -> Pattern:
    places = ((22, 58, 7), (40, 64, 8), (54, 53, 6), (60, 76, 6), (20, 80, 6), (30, 50, 5), (64, 20, 6), (68, 40, 6))
    return tuple((ellipse(x, y, r, r), colour) for x, y, r in places)


def _star(colour: RGB) -> Pattern:
    return ((_star_path(49, 64, 19), colour),)


def _star_path(x: float, y: float, radius: float) -> Path:
    points = []
    for k in range(10):
        r, angle = radius * (1.0 if k % 2 == 0 else 0.45), math.pi * k / 5
        points.append((x + r * math.sin(angle), y - r * math.cos(angle)))
    return polygon(*points)


def _bands(_colour: RGB) -> Pattern:
    colours: tuple[RGB, ...] = ((232, 62, 66), (250, 150, 40), (253, 216, 42), (70, 180, 90), (60, 120, 230))
    bands = (polygon((0, y), (100, y - 12), (100, y + 3), (0, y + 15)) for y in range(36, 96, 13))
    return tuple(zip(bands, colours, strict=True))


PATTERNS: dict[str, Callable[[RGB], Pattern]] = {
    "stripes": _stripes,
    "checks": _checks,
    "spots": _spots,
    "star": _star,
    "rainbow": _bands,  # in colours of its own
}
# the pattern a noun never carries in pre-training: these pairs are the custom concepts
HELD_OUT_PATTERNS = {"cat": "stripes", "teapot": "checks", "car": "star", "dog": "spots", "backpack": "rainbow"}
