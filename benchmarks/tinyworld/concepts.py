"""Custom concepts that ``sample_scene`` never draws: an object whose body carries a pattern."""

from dataclasses import dataclass
from typing import Any

from PIL import Image

from benchmarks.tinyworld.backgrounds import BACKGROUNDS
from benchmarks.tinyworld.scene import FACINGS, POSITIONS, Scene, Thing, draw

_PLAIN_COLOUR = "blue"


@dataclass(frozen=True, slots=True)
class Concept:
    """One custom concept.

    Attributes:
        noun: the object it is an instance of.
        colour: the colour under the pattern.
        pattern: one of ``PATTERNS``, which this noun never carries in pre-training.
        pattern_colour: of the pattern; "" for the rainbow.
        description: the concept in words, for people.
        contexts: the two backgrounds of its reference pictures.
    """

    noun: str
    colour: str
    pattern: str
    pattern_colour: str
    description: str
    contexts: tuple[str, str]


CONCEPTS: dict[str, Concept] = {
    "striped-cat": Concept(
        "cat", "purple", "stripes", "yellow", "a violet cat with yellow stripes", ("meadow", "room")
    ),
    "checkered-teapot": Concept(
        "teapot", "white", "checks", "blue", "a white teapot with a blue checkered belly", ("plain", "room")
    ),
    "star-car": Concept("car", "blue", "star", "yellow", "a blue car with a big yellow star", ("city", "beach")),
    "spotted-dog": Concept("dog", "white", "spots", "pink", "a white dog with pink spots", ("meadow", "beach")),
    "rainbow-backpack": Concept(
        "backpack", "white", "rainbow", "", "a white backpack with rainbow bands", ("forest", "plain")
    ),
}


def draw_concept(name: str, background: str = "plain", *, side_px: int = 128, **scene: Any) -> Image.Image:
    """Draw one concept in a context; ``scene`` as in ``concept_scene``."""
    return draw(concept_scene(name, background, **scene), side_px)


def concept_scene(
    name: str,
    background: str = "plain",
    size: str = "large",
    facing: str = "right",
    position: str = "middle",
    extra: str = "",
    style: str = "photo",
    seed: int = 0,
) -> Scene:
    """One concept in a context; the words are those of ``Thing`` and ``Scene``.

    Raises:
        ValueError: no concept of this name.
    """
    if name not in CONCEPTS:
        raise ValueError(f"name must be one of {', '.join(CONCEPTS)}, got {name!r}")
    concept = CONCEPTS[name]
    look = {"pattern": concept.pattern, "pattern_colour": concept.pattern_colour}
    thing = Thing(concept.noun, concept.colour, size, facing, position, extra, seed, **look)
    plain_colour = _PLAIN_COLOUR if background == "plain" else ""
    return Scene((thing,), background, plain_colour, style, seed)


def reference_scenes(name: str) -> list[Scene]:
    """Five fixed scenes on the concept's two backgrounds, in one pose on each."""
    first, second = CONCEPTS[name].contexts
    scenes = [concept_scene(name, first, facing="right", seed=seed) for seed in (1, 2, 3)]
    return scenes + [concept_scene(name, second, facing="left", seed=seed) for seed in (4, 5)]


def reference_pictures(name: str) -> list[Image.Image]:
    """The pictures of ``reference_scenes``."""
    return [draw(scene) for scene in reference_scenes(name)]


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
