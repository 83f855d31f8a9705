"""Infusion taken apart: without an intervention it is the method, and each intervention does what it says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import engine
from benchmarks.tinyworld import layout_training
from benchmarks.tinyworld.concepts import reference_pictures
from benchmarks.tinyworld.interventions import SLOTS, Foundations, Intervention, Part, mass_on, slot_positions
from benchmarks.tinyworld.layout_training import TRAININGS, Training, layer_sides, train
from engine.methods.infusion import project
from engine.weights.checkpoint import ASSETS

DRAWING = {"sampler": "dpmpp_2m", "steps": 4, "guidance_scale": 4.0}
TEXTS = ["a photo of a cat on a beach", "a sketch of a red cat and a boat in the snow"]
ONES = torch.ones(2, 16, 16)


def _apart(one: list[Image.Image], other: list[Image.Image]) -> int:
    return max(int(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max()) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def sd() -> engine.Engine:
    return engine.load()


@pytest.fixture(scope="module")
def foundations(sd: engine.Engine) -> Foundations:
    return Foundations(sd, "cat", TEXTS, [3, 4], DRAWING)


@pytest.fixture(scope="module")
def concept() -> engine.Concept:
    return engine.Concept.load(ASSETS / "concepts" / "striped-cat.safetensors")


@pytest.fixture(scope="module")
def parts(sd: engine.Engine, concept: engine.Concept) -> list[Part]:
    return [Part({"noun": project(concept, sd.unet)})]


def test_without_an_intervention_it_is_the_method(
    sd: engine.Engine, foundations: Foundations, concept: engine.Concept, parts: list[Part]
) -> None:
    out = sd.generate(
        TEXTS, seed=[3, 4], customization=engine.Infusion([concept], strength=0.5), progress=False, **DRAWING
    )
    assert out.foundation_images is not None
    assert _apart(foundations.images, out.foundation_images) <= 1  # a batch rounds otherwise
    assert _apart(foundations.draw(parts, Intervention(strength=0.5), ONES), out.images) <= 1
    assert _apart(foundations.images, out.images) > 20


@pytest.mark.parametrize(
    "how",
    [
        Intervention(sides=()),
        Intervention(first=1.0),
        Intervention(last=0.0),
        Intervention(strength=0.0, self_maps=1.0, power=2.0),
    ],
)
def test_where_nothing_acts_it_is_the_foundation(
    foundations: Foundations, parts: list[Part], how: Intervention
) -> None:
    assert _apart(foundations.draw(parts, how, ONES), foundations.images) <= 1


def test_a_map_is_cut_to_the_silhouette(foundations: Foundations, parts: list[Part]) -> None:
    nowhere = foundations.draw(parts, Intervention(cut=True), 0 * ONES)
    assert _apart(nowhere, foundations.images) <= 1
    assert (
        _apart(foundations.draw(parts, Intervention(cut=True), ONES), foundations.draw(parts, Intervention(), ONES))
        == 0
    )


def test_maps_are_raised_to_a_power_and_keep_their_largest_value(foundations: Foundations) -> None:
    for (_, plain), (_, raised) in zip(
        foundations._foundation(1, ["noun"], 1.0, None), foundations._foundation(1, ["noun"], 3.0, None), strict=True
    ):
        torch.testing.assert_close(raised, plain**3 / plain.amax(dim=1, keepdim=True) ** 2)


def test_every_intervention_does_something_of_its_own(foundations: Foundations, parts: list[Part]) -> None:
    changes = ({}, {"sides": (16,)}, {"sides": (8,)}, {"first": 0.5}, {"last": 0.5}, {"self_maps": 0.5}, {"power": 2.0})
    how = [Intervention(**one) for one in changes]
    drawn = [foundations.draw(parts, one, ONES) for one in how]
    assert min(_apart(a, b) for i, a in enumerate(drawn) for b in drawn[:i]) > 3
    halves = [Part(parts[0].residuals, last=0.5), Part(parts[0].residuals, first=0.5)]
    assert _apart(foundations.draw(halves, Intervention(), ONES), drawn[0]) == 0
    assert _apart(foundations.draw(halves[:1], Intervention(), ONES), drawn[4]) == 0


def test_slots_are_the_nouns_neighbours(sd: engine.Engine) -> None:
    found = dict(zip(SLOTS, slot_positions(sd.text_encoder.tokenize("a red cat runs"), "cat"), strict=True))
    ids = sd.text_encoder.tokenize("a red cat runs").ids
    assert (found["noun"], found["before"], found["start"]) == (3, 2, 0)
    assert ids[found["end"]] == sd.text_encoder.tokenizer.eos_token_id != ids[found["end"] - 1]


def test_other_slots_act_too(foundations: Foundations, parts: list[Part]) -> None:
    noun = parts[0].residuals["noun"]
    at_end = foundations.draw([Part({"noun": noun, "end": [0.1 * one for one in noun]})], Intervention(), ONES)
    assert _apart(at_end, foundations.draw(parts, Intervention(), ONES)) > 3
    off = foundations.draw([Part({"noun": noun, "end": [0 * one for one in noun]})], Intervention(), ONES)
    assert _apart(off, foundations.draw(parts, Intervention(), ONES)) <= 1


def test_mass_is_the_share_of_the_map_on_the_object(foundations: Foundations) -> None:
    left = torch.zeros(2, 16, 16)
    left[:, :, :8] = 1
    on_left, on_right = mass_on(foundations, left), mass_on(foundations, 1 - left)
    assert set(on_left) == {16, 8, 4, 2}
    for side, (share, area) in on_left.items():
        torch.testing.assert_close(share + on_right[side][0], torch.ones(2))
        assert area.tolist() == [0.5, 0.5]
    assert all(abs(float(share[0]) - 0.5) > 0.001 for share, _ in on_left.values())


@pytest.mark.parametrize("name", [name for name, one in TRAININGS.items() if not one.zoomed])
def test_trainings_learn_where_they_say(
    sd: engine.Engine, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout_training, "STEPS", 1)
    training, path = TRAININGS[name], tmp_path / "parts.pt"
    parts = train(sd, "striped-cat", training, path)
    assert [(part.first, part.last) for part in parts] == list(training.windows)
    for part in parts:
        assert tuple(part.residuals) == training.slots
        for residuals in part.residuals.values():
            assert [bool(one.any()) for one in residuals] == [side in training.sides for side in layer_sides(sd)]
    again = train(sd, "striped-cat", Training(), path)  # from the file
    assert torch.equal(again[0].residuals["noun"][0], parts[0].residuals["noun"][0])


def test_zoomed_pictures_are_whole_within_their_masks() -> None:
    images, masks = layout_training._pictures("striped-cat", Training(zoomed="edge", masked="picture"))
    assert masks is not None
    assert len(images) == len(masks) == 60
    sides = set()
    for image, mask in zip(images, masks, strict=True):
        left, top, right, bottom = mask.getbbox()
        assert right - left == bottom - top
        sides.add(right - left)
        assert image.size == mask.size == (128, 128)
    assert min(sides) >= 64
    assert max(sides) <= 128
    assert len(sides) > 20
    left, top, right, bottom = masks[0].getbbox()
    whole = reference_pictures("striped-cat")[0].resize((right - left,) * 2, Image.Resampling.LANCZOS)
    assert _apart([images[0].crop((left, top, right, bottom))], [whole]) == 0


def test_a_windows_noise_is_of_its_steps(sd: engine.Engine) -> None:
    noiser = layout_training._WindowNoiser(sd, 0.0, 0.4)  # the noisiest
    noised = noiser(torch.zeros(300, 4, 1, 1), torch.Generator().manual_seed(0))
    assert 600 <= int(noised.timesteps.min()) < 620
    assert 980 < int(noised.timesteps.max()) < 1000
    expected = (1 - noiser.alphas_cumprod[noised.timesteps]).sqrt()[:, None, None, None] * noised.noise
    torch.testing.assert_close(noised.latents, expected)
