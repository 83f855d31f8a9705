"""Tinyworld's pictures follow from their scenes, stay in frame, and are described in a closed vocabulary."""

import random
import re
from dataclasses import fields, replace

import numpy as np
import pytest

from benchmarks.tinyworld.backgrounds import BACKGROUNDS
from benchmarks.tinyworld.captions import VOCABULARY_WORDS, caption, full_prompt
from benchmarks.tinyworld.concepts import CONCEPTS, draw_concept, held_out_pictures, reference_pictures
from benchmarks.tinyworld.data import scene_at
from benchmarks.tinyworld.objects import ANIMALS, OBJECTS
from benchmarks.tinyworld.palette import COLOURS
from benchmarks.tinyworld.patterns import HELD_OUT_PATTERNS
from benchmarks.tinyworld.scene import EXTRAS, FACINGS, POSITIONS, SIZES, STYLES, Scene, Thing, draw, sample_scene


def _pixels(scene: Scene) -> np.ndarray:
    return np.asarray(draw(scene), dtype=int)


def _scenes(n_scenes: int) -> list[Scene]:
    rng = random.Random(7)
    return [sample_scene(rng) for _ in range(n_scenes)]


def test_drawing_is_deterministic():
    for scene in _scenes(30):
        assert draw(scene).tobytes() == draw(scene).tobytes()
    assert _scenes(5) == _scenes(5)


def test_the_seeds_change_the_picture():
    scene = Scene((Thing("cat", "red"),), "beach")
    assert draw(scene).tobytes() != draw(replace(scene, seed=1)).tobytes()
    assert draw(scene).tobytes() != draw(replace(scene, things=(Thing("cat", "red", seed=1),))).tobytes()


@pytest.mark.parametrize("size", [64, 128, 200])
@pytest.mark.parametrize("style", STYLES)
def test_a_picture_has_the_size_asked_for(size: int, style: str):
    picture = draw(Scene((Thing("dog", "blue"),), "snow", style=style), size)
    assert picture.mode == "RGB"
    assert picture.size == (size, size)


@pytest.mark.parametrize("noun", OBJECTS)
def test_objects_stay_in_frame(noun: str):
    empty = _pixels(Scene((), "plain", "white"))
    for seed in range(20):
        for size in SIZES:
            for position in POSITIONS:
                for facing in FACINGS:
                    extra = "hat" if noun in ANIMALS else "ball"
                    thing = Thing(noun, "red", size, facing, position, extra, seed)
                    difference = np.abs(_pixels(Scene((thing,), "plain", "white")) - empty).sum(axis=2)
                    border = np.concatenate([difference[0], difference[-1], difference[:, 0], difference[:, -1]])
                    assert border.max() == 0, thing
                    assert (difference > 60).sum() > 128 * 128 * 0.04, thing


def test_sampling_reaches_every_attribute():
    scenes = _scenes(3000)
    things = [thing for scene in scenes for thing in scene.things]
    seen = {field.name: {getattr(thing, field.name) for thing in things} for field in fields(Thing)}
    assert seen["object"] == set(OBJECTS)
    assert seen["colour"] == set(COLOURS)
    assert seen["size"] == set(SIZES)
    assert seen["facing"] == set(FACINGS)
    assert seen["position"] == set(POSITIONS)
    assert seen["extra"] == set(EXTRAS)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {scene.style for scene in scenes} == set(STYLES)
    assert {len(scene.things) for scene in scenes} == {1, 2}
    assert all(thing.object in ANIMALS for thing in things if thing.extra == "hat")
    assert all(bool(scene.plain_colour) == (scene.background == "plain") for scene in scenes)


def test_black_and_white_objects_stand_out():
    for colour, background in (("white", "snow"), ("black", "night sky")):
        for noun in OBJECTS:
            scene = Scene((Thing(noun, colour),), background)
            difference = np.abs(_pixels(scene) - _pixels(replace(scene, things=()))).sum(axis=2)
            assert (difference > 150).sum() > 250, noun


def test_captions_are_short_lower_case_and_closed():
    rng = random.Random(3)
    words_seen = set()
    for scene in _scenes(3000):
        for text in (caption(scene, rng), full_prompt(scene)):
            words = re.findall(r"[a-z]+", text)
            assert re.fullmatch(r"[a-z]+(,? [a-z]+)*", text), text
            assert len(words) <= 22, text
            words_seen.update(words)
    assert words_seen == set(VOCABULARY_WORDS)
    assert len(VOCABULARY_WORDS) < 110


def test_full_prompt_says_everything():
    things = (Thing("cat", "orange", extra="hat"),)
    assert full_prompt(Scene(things, "plain", "blue", "sketch")) == (
        "a sketch of an orange cat wearing a hat on a plain blue background"
    )


@pytest.mark.parametrize("name", CONCEPTS)
def test_a_concept_differs_from_its_object(name: str):
    concept = CONCEPTS[name]
    plain = _pixels(Scene((Thing(concept.noun, concept.colour),), "plain", "blue"))
    difference = np.abs(np.asarray(draw_concept(name), dtype=int) - plain).sum(axis=2)
    assert (difference > 150).sum() > 300


@pytest.mark.parametrize("name", CONCEPTS)
def test_concept_pictures_are_fixed_and_distinct(name: str):
    references = [picture.tobytes() for picture in reference_pictures(name)]
    held_out = [picture.tobytes() for picture in held_out_pictures(name)]
    assert references == [picture.tobytes() for picture in reference_pictures(name)]
    assert len(references) == 5
    assert len(set(references + held_out)) == len(references) + len(held_out)
    assert len(CONCEPTS[name].contexts) == 2


def test_an_unknown_concept_is_refused():
    with pytest.raises(ValueError, match="got 'unicorn'"):
        draw_concept("unicorn")


def test_pre_training_has_patterns_but_no_custom_concept():
    things = [thing for i in range(400) for thing in scene_at(i, patterned=True).things]
    assert 0.3 < sum(bool(thing.pattern) for thing in things) / len(things) < 0.5
    assert all(thing.pattern != HELD_OUT_PATTERNS.get(thing.object, "none") for thing in things)
    assert {concept.noun: concept.pattern for concept in CONCEPTS.values()} == HELD_OUT_PATTERNS
    assert all(thing.pattern_colour != thing.colour for thing in things)


def test_a_pattern_changes_its_object_alone():
    plain = Scene((Thing("mug", "red"),), "room")
    spotted = Scene((Thing("mug", "red", pattern="spots", pattern_colour="white"),), "room")
    rows, columns = np.nonzero(np.abs(_pixels(spotted) - _pixels(plain)).sum(axis=2))
    assert len(rows) > 200
    assert rows.min() > 30
    assert 20 < columns.min() <= columns.max() < 110
