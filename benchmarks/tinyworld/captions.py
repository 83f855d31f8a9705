"""A small caption grammar with paraphrases; attributes are sometimes left unsaid, so that they vary freely."""

import random
import re

from benchmarks.tinyworld.backgrounds import BACKGROUNDS
from benchmarks.tinyworld.objects import OBJECTS
from benchmarks.tinyworld.palette import COLOURS, PLAIN_COLOURS
from benchmarks.tinyworld.scene import Scene, Thing

FACING_NOUNS: tuple[str, ...] = ("cat", "dog", "duck", "bear", "teapot", "car", "boat", "shoe")

_STYLES: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of", "a photo of", "a picture of"),
    "sketch": ("a sketch of", "a sketch of", "a drawing of"),
    "pixel": ("pixel art of", "pixel art of", "a pixel picture of"),
}
_BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "beach": ("on a beach", "on the beach", "at the beach"),
    "forest": ("in a forest", "in the forest", "in the woods"),
    "snow": ("in the snow", "on the snow", "in deep snow"),
    "night sky": ("under the night sky", "under a night sky", "at night"),
    "city": ("in a city", "in the city", "on a city street"),
    "desert": ("in a desert", "in the desert", "on desert sand"),
    "room": ("in a room", "in the room", "inside a room"),
    "river": ("by a river", "by the river", "near a river"),
    "meadow": ("in a meadow", "in the meadow", "on a grassy meadow"),
    "plain": ("on a plain {} background", "on a {} background", "with a plain {} background"),
}
_SIZES: dict[str, tuple[str, ...]] = {"small": ("small", "small", "little"), "large": ("large", "large", "big")}
_POSITIONS: dict[str, tuple[str, ...]] = {
    "left": ("on the left", "on the left side"),
    "middle": ("in the middle", "in the center"),
    "right": ("on the right", "on the right side"),
}
_FACINGS: dict[str, tuple[str, ...]] = {
    "left": ("facing left", "looking left"),
    "right": ("facing right", "looking right"),
}
_EXTRAS: dict[str, tuple[str, ...]] = {
    "": ("",),
    "hat": ("wearing a hat", "wearing a hat", "with a hat"),
    "ball": ("with a ball", "with a ball", "and a ball"),
}
# an adjective before the object's colour, or a phrase after the noun. Not in the vocabulary: the tokenizer spells them
_PATTERNS: dict[str, tuple[str, str]] = {
    "stripes": ("{} striped", "with {} stripes"),
    "checks": ("{} checkered", "with {} checks"),
    "spots": ("{} spotted", "with {} spots"),
    "star": ("{} starry", "with a {} star"),
    "rainbow": ("rainbow", "with rainbow bands"),
}

_SAID_PHOTO = 0.75
_SAID_COLOUR = 0.8
_SAID_BACKGROUND = 0.92
_SAID_SIZE = 0.4
_SAID_POSITION = 0.35
_SAID_FACING = 0.3
_SAID_PATTERN = 0.9
_PATTERN_FIRST = 0.6


def caption(scene: Scene, rng: random.Random) -> str:
    """Describe a scene in at most 22 lower-case words, leaving some attributes unsaid."""
    said_position = rng.random() < _SAID_POSITION
    two = len(scene.things) == 2
    phrases = [_thing_phrase(thing, rng, brief=two, said_position=said_position) for thing in scene.things]
    text = " and ".join(phrases)
    if scene.style != "photo" or rng.random() < _SAID_PHOTO:
        text = f"{rng.choice(_STYLES[scene.style])} {text}"
    if rng.random() < _SAID_BACKGROUND:
        comma = "," if said_position else ""
        text += f"{comma} {rng.choice(_BACKGROUNDS[scene.background]).format(scene.plain_colour)}"
    return text


def full_prompt(scene: Scene) -> str:
    """The standard form of a scene: style, objects, their colours (one that is "" stays unsaid), extras, background."""
    phrases = []
    for thing in scene.things:
        words = (_pattern_words(thing)[0], thing.colour, thing.object)
        phrase = _with_article(" ".join(word for word in words if word))
        phrases.append(f"{phrase} {_EXTRAS[thing.extra][0]}".strip())
    background = _BACKGROUNDS[scene.background][0].format(scene.plain_colour)
    return f"{_STYLES[scene.style][0]} {' and '.join(phrases)} {background}"


def _thing_phrase(thing: Thing, rng: random.Random, *, brief: bool, said_position: bool) -> str:
    """Name one object; ``brief`` leaves out its size and facing, which two objects have no room for."""
    words = []
    if not brief and rng.random() < _SAID_SIZE:
        words.append(rng.choice(_SIZES[thing.size]))
    before, after = _pattern_words(thing)
    says_pattern = before and rng.random() < _SAID_PATTERN
    says_first = says_pattern and rng.random() < _PATTERN_FIRST
    if says_first:
        words.append(before)
    if rng.random() < _SAID_COLOUR:
        words.append(thing.colour)
    parts = [_with_article(" ".join((*words, thing.object)))]
    if says_pattern and not says_first:
        parts.append(after)
    parts.append(rng.choice(_EXTRAS[thing.extra]))
    if not brief and thing.object in FACING_NOUNS and rng.random() < _SAID_FACING:
        parts.append(rng.choice(_FACINGS[thing.facing]))
    if said_position:
        parts.append(_POSITIONS[thing.position][0] if brief else rng.choice(_POSITIONS[thing.position]))
    return " ".join(part for part in parts if part)


def _pattern_words(thing: Thing) -> tuple[str, str]:
    before, after = _PATTERNS[thing.pattern] if thing.pattern else ("", "")
    return before.format(thing.pattern_colour), after.format(thing.pattern_colour)


def phrase_starts(text: str) -> list[int]:
    """Where in a caption a phrase starts that needs nothing of what stands before: another thing, the background."""
    return sorted(found.start() for found in _NEW_PHRASE.finditer(text))


def _with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _vocabulary() -> tuple[str, ...]:
    tables = (_STYLES, _BACKGROUNDS, _SIZES, _POSITIONS, _FACINGS, _EXTRAS)
    phrases = [phrase for table in tables for choices in table.values() for phrase in choices]
    phrases += [*OBJECTS, *COLOURS, *PLAIN_COLOURS, "a", "an", "and"]
    return tuple(sorted(set(re.findall(r"[a-z]+", " ".join(phrases)))))


def _new_phrase() -> re.Pattern[str]:
    backgrounds = sorted({phrase for choices in _BACKGROUNDS.values() for phrase in choices}, key=len, reverse=True)
    choices = ("and", *(re.escape(phrase).replace(r"\{\}", r"\w+") for phrase in backgrounds))
    return re.compile(rf"\b(?:{'|'.join(choices)})\b")


_NEW_PHRASE = _new_phrase()
VOCABULARY_WORDS: tuple[str, ...] = _vocabulary()
assert set(_BACKGROUNDS) == set(BACKGROUNDS)
