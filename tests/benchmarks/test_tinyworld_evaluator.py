"""The evaluator names attributes and embeds pictures and captions; its verdicts follow from what it sees."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.tinyworld.data import HELD_OUT_SEED, pictures_at, scene_at
from benchmarks.tinyworld.evaluate import PROMPTED, interval, judge, psnr_db, score, summary, table
from benchmarks.tinyworld.scene import Scene, Thing
from benchmarks.tinyworld.train_evaluator import losses, soften
from engine.evaluate.tinyworld import (
    NOUNS,
    PICTURE_CHOICES,
    THING_CHOICES,
    Attributes,
    Evaluator,
    load_evaluator,
    save_evaluator,
    tokenize,
)

ONE = Scene((Thing("mug", "green", "small", "left", "right"),), "room", style="sketch")
TWO = Scene((Thing("cat", "red", "small", "left", "left"), Thing("car", "blue", "small", "right", "right")), "beach")


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    torch.manual_seed(0)
    return Evaluator().eval()


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return pictures_at(range(4))


def _truth(scene: Scene) -> Attributes:
    """What a perfect evaluator says of a scene's picture."""
    things = {thing.object: thing for thing in scene.things}
    said = {name: {noun: getattr(things.get(noun, scene.things[0]), name) for noun in NOUNS} for name in THING_CHOICES}
    confidence = dict.fromkeys(things, 5.0) | {noun: -5.0 for noun in NOUNS if noun not in things}
    return Attributes(confidence=confidence, **said, background=scene.background, style=scene.style)


class _Oracle(Evaluator):
    """Says what it was told, whatever the pictures."""

    def __init__(self, seen: list[Attributes]) -> None:
        super().__init__()
        self.seen = seen

    def classify(self, pictures: Tensor, batch: int = 100) -> list[Attributes]:  # noqa: ARG002
        return self.seen


def test_it_is_small(evaluator: Evaluator):
    assert sum(weight.numel() for weight in evaluator.pictures.parameters()) <= 350_000
    assert sum(weight.numel() for weight in evaluator.captions.parameters()) <= 150_000


def test_logits_have_a_row_per_picture(evaluator: Evaluator, pictures: Tensor):
    logits = evaluator(pictures)
    assert logits.objects.shape == (4, 12)
    assert {name: x.shape for name, x in logits.things.items()} == {
        name: (4, 12, len(choices)) for name, choices in THING_CHOICES.items()
    }
    assert {name: x.shape for name, x in logits.picture.items()} == {
        name: (4, len(choices)) for name, choices in PICTURE_CHOICES.items()
    }


def test_embeddings_have_unit_length(evaluator: Evaluator, pictures: Tensor):
    texts = evaluator.embed_texts(["a photo of a red cat", "a boat", "", "nothing known here"])
    for embedded in (evaluator.embed_pictures(pictures), texts):
        assert embedded.shape == (4, 96)
        torch.testing.assert_close(embedded.norm(dim=1), torch.ones(4))


def test_neither_batch_nor_padding_changes_what_it_says(evaluator: Evaluator, pictures: Tensor):
    torch.testing.assert_close(evaluator.embed_pictures(pictures, batch=3), evaluator.embed_pictures(pictures))
    together = evaluator.embed_texts(["a red cat", "pixel art of a blue boat and a green tree in deep snow"])
    torch.testing.assert_close(evaluator.embed_texts(["a red cat"]), together[:1])


def test_unknown_words_are_passed_over_and_long_texts_cut():
    assert tokenize(["a <new1> cat"]).tolist() == tokenize(["a cat"]).tolist()
    assert tokenize(["cat " * 100]).shape == (1, 32)


def test_classify_names_only_known_choices(evaluator: Evaluator, pictures: Tensor):
    for seen in evaluator.classify(pictures):
        assert set(seen.confidence) == set(NOUNS)
        assert list(seen.confidence.values()) == sorted(seen.confidence.values(), reverse=True)
        for name, choices in THING_CHOICES.items():
            assert set(getattr(seen, name).values()) <= set(choices)
        for name, choices in PICTURE_CHOICES.items():
            assert getattr(seen, name) in choices


@pytest.mark.parametrize("scene", [ONE, TWO], ids=["one", "two"])
def test_the_truth_is_right_in_everything(scene: Scene):
    right = judge(_truth(scene), scene)
    assert all(right.values())
    assert ("facing" in right) == (scene is TWO)  # captions never say how a mug faces


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("object", replace(TWO, things=(TWO.things[0], replace(TWO.things[1], object="dog")))),
        ("colour", replace(TWO, things=(TWO.things[0], replace(TWO.things[1], colour="green")))),
        ("position", replace(TWO, things=(replace(TWO.things[0], position="middle"), TWO.things[1]))),
        ("background", replace(TWO, background="river")),
        ("style", replace(TWO, style="pixel")),
    ],
)
def test_one_wrong_attribute_is_noticed(name: str, wrong: Scene):
    right = judge(_truth(wrong), TWO)
    assert not right[name]
    assert right["all"] == (name == "position")


def test_a_second_object_nobody_asked_for_spoils_only_object():
    seen = replace(_truth(ONE), confidence={"mug": 4.0, "cat": 1.0})
    assert judge(seen, ONE)["object"]
    assert not judge(seen, ONE)["only_object"]
    assert not judge(replace(seen, confidence={"cat": 4.0, "mug": 1.0}), ONE)["object"]


def test_score_collects_verdicts_in_order(pictures: Tensor):
    oracle = _Oracle([_truth(TWO), _truth(replace(ONE, style="photo")), _truth(ONE), _truth(TWO)])
    verdicts = score(pictures, [TWO, ONE, ONE, TWO], oracle)
    assert verdicts["style"] == verdicts["all"] == [True, False, True, True]
    assert verdicts["object"] == [True] * 4
    found = summary(verdicts)
    assert set(found) == set(PROMPTED)
    assert found["style"]["accuracy"] == 0.75
    assert found["style"]["n"] == 4


def test_intervals_hold_the_share_and_narrow_with_more_verdicts():
    few, many = interval([True] * 9 + [False]), interval([True] * 900 + [False] * 100)
    assert few[0] < many[0] < 0.9 < many[1] < few[1]
    assert interval([True] * 10) == (1.0, 1.0)


def test_psnr_is_of_a_range_of_two():
    assert psnr_db(torch.full((2, 3, 8, 8), 0.2), torch.zeros(2, 3, 8, 8)) == pytest.approx(20, abs=1e-4)


def test_the_table_shows_every_accuracy():
    found = summary({name: [True, False] for name in PROMPTED})
    columns = ("generated", "drawn", "reconstructed", "held_out")
    results = dict.fromkeys(columns, found) | {
        "vae_psnr_db": 28.5,
        "caption_similarity": {"generated": 0.5, "drawn": 0.6},
    }
    assert table(results).count("50.0") == len(PROMPTED) * len(columns)


def test_weights_survive_a_file(evaluator: Evaluator, pictures: Tensor, tmp_path: Path):
    path = tmp_path / "evaluator.safetensors"
    save_evaluator(evaluator, path, {"samples": "0"})
    assert path.stat().st_size < 1_000_000
    loaded = load_evaluator(path)
    assert {weight.dtype for weight in loaded.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(loaded.embed_pictures(pictures), evaluator.embed_pictures(pictures), atol=2e-3, rtol=0)


def test_the_shipped_weights_know_the_world():
    scenes = [scene_at(index, HELD_OUT_SEED) for index in range(100)]
    found = summary(score(pictures_at(range(100), HELD_OUT_SEED), scenes, load_evaluator()))
    for name in ("object", "colour", "background", "style"):
        assert found[name]["accuracy"] >= 0.97, name


def test_every_attribute_is_trained(pictures: Tensor):
    model = Evaluator()
    scenes = [scene_at(index) for index in range(4)]
    softened = soften(pictures, torch.Generator().manual_seed(0))
    found = losses(model(softened), scenes)
    assert set(found) == {"object", *THING_CHOICES, *PICTURE_CHOICES}
    torch.stack(list(found.values())).sum().backward()
    unused = {name for name, weight in model.pictures.named_parameters() if weight.grad is None}
    assert unused == {"project.weight", "project.bias"}  # trained by the contrastive loss
