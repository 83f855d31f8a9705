"""Scenes: what a picture shows, how one is sampled, and how it is drawn. Everything follows from the scene."""

import random
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.tinyworld.backgrounds import BACKGROUNDS, CANVAS, draw_background
from benchmarks.tinyworld.objects import ANIMALS, OBJECTS, draw_ball, draw_hat
from benchmarks.tinyworld.palette import COLOURS, PLAIN_COLOURS, make_paint, mix
from benchmarks.tinyworld.patterns import HELD_OUT_PATTERNS, PATTERNS
from benchmarks.tinyworld.pen import Frame, Pen

SIZES: tuple[str, ...] = ("small", "large")
FACINGS: tuple[str, ...] = ("left", "right")
POSITIONS: tuple[str, ...] = ("left", "middle", "right")
STYLES: tuple[str, ...] = ("photo", "sketch", "pixel")
EXTRAS: tuple[str, ...] = ("", "hat", "ball")

_EXTENT_PX = {"small": 100, "large": 158}  # side of the object's grid, on the canvas
_SHIFT_PX = {"small": 62, "large": 28}
_FEET_PX = {"small": 212, "large": 232}
_BALL_PX = 44
_SKETCH_WASH = 0.62
_COARSE = 8
_PATTERNED = 0.4
_NOWHERE = (255, 0, 255)  # a colour that no drawing uses


@dataclass(frozen=True, slots=True)
class Thing:
    """One object and its attributes; ``seed`` decides its jitter.

    ``pattern`` is one of ``PATTERNS`` or "" for none, and ``pattern_colour`` its colour ("" for the rainbow's own).
    """

    object: str
    colour: str
    size: str = "large"
    facing: str = "right"
    position: str = "middle"
    extra: str = ""
    seed: int = 0
    pattern: str = ""
    pattern_colour: str = ""


@dataclass(frozen=True, slots=True)
class Scene:
    """A whole picture; ``plain_colour`` is empty unless the background is plain."""

    things: tuple[Thing, ...]
    background: str
    plain_colour: str = ""
    style: str = "photo"
    seed: int = 0


def sample_scene(rng: random.Random) -> Scene:
    """Draw a scene at random: 85 % show one object, 15 % two small ones side by side."""
    background = rng.choice(BACKGROUNDS)
    nouns = rng.sample(list(OBJECTS), 2)
    colours = [rng.choice(list(COLOURS)) for _ in nouns]
    if rng.random() < 0.15:
        things = tuple(
            Thing(noun, colour, "small", rng.choice(FACINGS), position, seed=rng.getrandbits(32))
            for noun, colour, position in zip(nouns, colours, ("left", "right"), strict=True)
        )
    else:
        extra = ""
        if rng.random() < 0.15:
            extra = rng.choice(("hat", "ball")) if nouns[0] in ANIMALS else "ball"
        size, facing, position = rng.choice(SIZES), rng.choice(FACINGS), rng.choice(POSITIONS)
        things = (Thing(nouns[0], colours[0], size, facing, position, extra, rng.getrandbits(32)),)
    plain_colour = ""
    if background == "plain":
        plain_colour = rng.choice([name for name in PLAIN_COLOURS if all(name != thing.colour for thing in things)])
    style = rng.choices(STYLES, (70, 15, 15))[0]
    return Scene(things, background, plain_colour, style, rng.getrandbits(32))


def with_patterns(scene: Scene, rng: random.Random) -> Scene:
    """Give 40 % of a scene's objects a pattern, never the one that is held out for their noun."""
    return replace(scene, things=tuple(_with_pattern(thing, rng) for thing in scene.things))


def _with_pattern(thing: Thing, rng: random.Random) -> Thing:
    if rng.random() >= _PATTERNED:
        return thing
    pattern = rng.choice([name for name in PATTERNS if name != HELD_OUT_PATTERNS.get(thing.object)])
    colour = rng.choice([name for name in COLOURS if name != thing.colour])
    return replace(thing, pattern=pattern, pattern_colour="" if pattern == "rainbow" else colour)


def draw(scene: Scene, size: int = 128) -> Image.Image:
    """Draw a scene as a square RGB picture.

    Args:
        scene: what to show.
        size: side of the picture in pixels.
    """
    wash = _SKETCH_WASH if scene.style == "sketch" else 0.0
    image = draw_background(scene.background, scene.plain_colour, random.Random(scene.seed), wash)
    for thing in scene.things:
        _draw_thing(image, thing, scene)
    if scene.style == "pixel":
        return image.reduce(_COARSE).resize((size, size), Image.Resampling.NEAREST)
    if size * 2 == CANVAS:
        return image.reduce(2)
    return image.resize((size, size), Image.Resampling.LANCZOS)


def silhouettes(scene: Scene, side: int) -> np.ndarray:
    """How much of each cell of a grid each thing covers, with its shadow; (things, side, side) uint8."""
    cells = []
    for thing in scene.things:
        image = Image.new("RGB", (CANVAS, CANVAS), _NOWHERE)
        _draw_thing(image, thing, scene)
        drawn = (np.asarray(image) != _NOWHERE).any(axis=2)
        cells.append(drawn.reshape(side, CANVAS // side, side, CANVAS // side).mean(axis=(1, 3)) * 255)
    return np.stack(cells).round().astype(np.uint8)


def _draw_thing(image: Image.Image, thing: Thing, scene: Scene) -> None:
    rng = random.Random(thing.seed)
    paint = make_paint(thing.colour, scene.style, scene.background == "night sky")
    scale = _EXTENT_PX[thing.size] / 100 * rng.uniform(0.95, 1.03)
    aspect = rng.uniform(-0.04, 0.04)
    x = CANVAS / 2 + _SHIFT_PX[thing.size] * (POSITIONS.index(thing.position) - 1)
    x += rng.uniform(-6, 6)
    y = _FEET_PX[thing.size] + rng.uniform(-7, 5)
    turn = rng.uniform(-5, 5)
    mirror = -1 if thing.facing == "left" else 1
    frame = Frame(x, y, mirror * scale * (1 + aspect), scale * (1 - aspect), turn)
    _shadow(image, x, y, 46 * scale)
    colour = COLOURS.get(thing.pattern_colour, paint.base)  # the rainbow has none and needs none
    pen = Pen(image, frame, paint, PATTERNS[thing.pattern](colour) if thing.pattern else ())
    OBJECTS[thing.object](pen)
    if thing.extra == "hat":
        draw_hat(pen, thing.object)
    elif thing.extra == "ball":
        side = -1 if thing.position == "right" else 1
        ball_x = min(max(x + side * 50 * scale, _BALL_PX / 2 + 6), CANVAS - _BALL_PX / 2 - 6)
        _shadow(image, ball_x, y + 4, _BALL_PX / 2)
        draw_ball(Pen(image, Frame(ball_x, y + 6, _BALL_PX / 100, _BALL_PX / 100, 4 * turn), paint))


def _shadow(image: Image.Image, x: float, y: float, half_width: float) -> None:
    """Darken the ground under an object with one flat ellipse."""
    ground = image.getpixel((int(min(max(x, 0), CANVAS - 1)), int(min(y + 8, CANVAS - 1))))
    assert isinstance(ground, tuple)
    colour = mix((ground[0], ground[1], ground[2]), (30, 30, 60), 0.2)
    box = (x - half_width, y - 12, x + half_width, y + 6)
    ImageDraw.Draw(image).ellipse(box, fill=colour)
