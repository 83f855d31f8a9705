"""Custom concepts that ``sample_scene`` never draws: an object whose body carries a pattern."""

import math
from dataclasses import dataclass

from PIL import Image

from benchmarks.tinyworld.backgrounds import BACKGROUNDS
from benchmarks.tinyworld.palette import RGB
from benchmarks.tinyworld.pen import Path, Pattern, ellipse, polygon, tube
from benchmarks.tinyworld.scene import FACINGS, POSITIONS, Scene, Thing, draw

_PLAIN_COLOUR = "blue"


@dataclass(frozen=True, slots=True)
class Concept:
    """One custom concept.

    Attributes:
        noun: the object it is an instance of.
        colour: the colour under the pattern.
        pattern: paths on the object's grid, clipped to its body.
        description: the concept in words, for people.
        contexts: the two backgrounds of its reference pictures.
    """

    noun: str
    colour: str
    pattern: Pattern
    description: str
    contexts: tuple[str, str]


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


def _star(x: float, y: float, radius: float) -> Path:
    points = []
    for k in range(10):
        r, angle = radius * (1.0 if k % 2 == 0 else 0.45), math.pi * k / 5
        points.append((x + r * math.sin(angle), y - r * math.cos(angle)))
    return polygon(*points)


def _rainbow() -> Pattern:
    colours: tuple[RGB, ...] = ((232, 62, 66), (250, 150, 40), (253, 216, 42), (70, 180, 90), (60, 120, 230))
    bands = (polygon((0, y), (100, y - 12), (100, y + 3), (0, y + 15)) for y in range(36, 96, 13))
    return tuple(zip(bands, colours, strict=True))


CONCEPTS: dict[str, Concept] = {
    "striped-cat": Concept(
        "cat", "purple", _stripes((253, 220, 60)), "a violet cat with yellow stripes", ("meadow", "room")
    ),
    "checkered-teapot": Concept(
        "teapot", "white", _checks((30, 60, 150)), "a white teapot with a blue checkered belly", ("plain", "room")
    ),
    "star-car": Concept(
        "car", "blue", ((_star(49, 64, 19), (255, 222, 50)),), "a blue car with a big yellow star", ("city", "beach")
    ),
    "spotted-dog": Concept("dog", "white", _spots((246, 92, 160)), "a white dog with pink spots", ("meadow", "beach")),
    "rainbow-backpack": Concept(
        "backpack", "white", _rainbow(), "a white backpack with rainbow bands", ("forest", "plain")
    ),
}


def draw_concept(
    name: str,
    background: str = "plain",
    *,
    size: str = "large",
    facing: str = "right",
    position: str = "middle",
    extra: str = "",
    style: str = "photo",
    seed: int = 0,
    side_px: int = 128,
) -> Image.Image:
    """Draw one concept in a context; the words are those of ``Thing`` and ``Scene``.

    Raises:
        ValueError: no concept of this name.
    """
    if name not in CONCEPTS:
        raise ValueError(f"name must be one of {', '.join(CONCEPTS)}, got {name!r}")
    concept = CONCEPTS[name]
    thing = Thing(concept.noun, concept.colour, size, facing, position, extra, seed)
    plain_colour = _PLAIN_COLOUR if background == "plain" else ""
    return draw(Scene((thing,), background, plain_colour, style, seed), side_px, concept.pattern)


def reference_pictures(name: str) -> list[Image.Image]:
    """Five fixed pictures on the concept's two backgrounds, in one pose on each."""
    first, second = CONCEPTS[name].contexts
    pictures = [draw_concept(name, first, facing="right", seed=seed) for seed in (1, 2, 3)]
    return pictures + [draw_concept(name, second, facing="left", seed=seed) for seed in (4, 5)]


def held_out_pictures(name: str) -> list[Image.Image]:
    """The concept on every background, at every position and in both sizes: 60 pictures."""
    return [
        draw_concept(name, background, size=size, facing=FACINGS[seed % 2], position=position, seed=1000 + seed)
        for seed, (background, position, size) in enumerate(
            (background, position, size)
            for background in BACKGROUNDS
            for position in POSITIONS
            for size in ("small", "large")
        )
    ]
