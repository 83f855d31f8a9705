"""DCI against a literal reference in diffusers' modules, and how its rows come and go."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import engine
from engine.methods.concept_cache import Texts
from engine.methods.dci import make_branches, replace_phrase
from engine.sampling.seeds import auxiliary_seed
from engine.text.weighting import parse_weights
from tests.parity.dci_reference import LiteralDCI, Side
from tests.pipelines import relative_error, save_pipeline

_PROMPT = "a photo of a cat beside a teapot on a beach"
_AUXILIARY = "a photo of a dog beside a teapot on a beach"
_STEPS = 8


def _draw(sd: engine.Engine, customization=None, prompt=_PROMPT, seed=3, **options) -> engine.Result:
    settings = {"steps": _STEPS, "guidance_scale": 5.0, "output": "latent", "progress": False} | options
    return sd.generate(prompt, customization=customization, seed=seed, **settings)


@pytest.fixture(scope="module", params=["narrow", "deep_heads_per_block"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp(request.param)
    pipeline = save_pipeline(request.param, folder, seed=5)
    for name, weight in pipeline.unet.named_parameters():
        if "attn2.to_" in name:
            weight.data *= 6  # random text hardly matters otherwise
    pipeline.save_pretrained(folder)
    return engine.load(folder), LiteralDCI(pipeline)


def _sides(sd: engine.Engine) -> tuple[Side, Side]:
    tokens = [sd.text_encoder.tokenizer(text, add_special_tokens=False).input_ids for text in (_PROMPT, _AUXILIARY)]
    (cat,), (dog,) = (sd.text_encoder.tokenizer(noun, add_special_tokens=False).input_ids for noun in ("cat", "dog"))
    concept = [1 + i for i, token in enumerate(tokens[0]) if token == cat]
    others = [1 + i for i, token in enumerate(tokens[1]) if token != dog]
    return Side(concept, len(tokens[0])), Side(others, len(tokens[1]))


def _noise(seed: int) -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("strength", [-2.0, 1.0, 2.0])
@pytest.mark.parametrize(("preset", "guidance"), [("calibrated", "shared"), ("calibrated", "own"), ("paper", "shared")])
def test_final_latents(both, preset: str, guidance: str, strength: float, fraction: float) -> None:
    sd, literal = both
    dci = engine.DCI("cat", "dog", strength=strength, fraction=fraction, preset=preset, guidance=guidance)
    expected = literal(
        (_PROMPT, _AUXILIARY),
        _sides(sd),
        (_noise(3), _noise(3)),
        steps=_STEPS,
        mixing_steps=round(fraction * _STEPS),
        guidance_scale=5.0,
        strength=strength,
        preset=preset,
        guidance=guidance,
    )
    assert relative_error(_draw(sd, dci).latents, expected) <= 5e-4
    assert relative_error(_draw(sd).latents, expected) > 2e-3  # mixing does something


@pytest.mark.parametrize("ablation", ["masked", "last_layer_only", "separate_prompts"])
def test_ablations(both, ablation: str) -> None:
    sd, literal = both
    dci = engine.DCI("cat", "dog", fraction=0.5, **{ablation: ablation != "masked"})
    concept, other = _sides(sd)
    prompt = _PROMPT
    if ablation == "separate_prompts":
        prompt, concept = "a photo of a cat", Side([5], 5)
    expected = literal(
        (prompt, _AUXILIARY),
        (concept, other),
        (_noise(3), _noise(3)),
        steps=_STEPS,
        mixing_steps=_STEPS // 2 if ablation != "separate_prompts" else _STEPS,
        guidance_scale=5.0,
        strength=1.0,
        preset="calibrated",
        guidance="shared",
        masked=ablation != "masked",
        layers=list(sd.unet.cross_attentions)[-1:] if ablation == "last_layer_only" else None,
    )
    if ablation == "separate_prompts":  # afterwards the whole prompt is seen, so mix to the end here
        dci = engine.DCI("cat", "dog", fraction=1.0, separate_prompts=True)
    assert relative_error(_draw(sd, dci).latents, expected) <= 5e-4


def test_independent_noise(both) -> None:
    sd, literal = both
    dci = engine.DCI("cat", "dog", fraction=0.5, noise="independent")
    expected = literal(
        (_PROMPT, _AUXILIARY),
        _sides(sd),
        (_noise(3), _noise(auxiliary_seed(3))),
        steps=_STEPS,
        mixing_steps=_STEPS // 2,
        guidance_scale=5.0,
        strength=1.0,
        preset="calibrated",
        guidance="shared",
    )
    assert relative_error(_draw(sd, dci).latents, expected) <= 5e-4


def test_rows_come_and_go(small: engine.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    denoise = small.unet.denoise
    monkeypatch.setattr(small.unet, "denoise", lambda x, c: rows.append(len(c.shifts)) or denoise(x, c))
    _draw(small, engine.DCI("cat", fraction=0.25))
    assert rows == [3] * 2 + [2] * 6
    rows.clear()
    _draw(small, engine.DCI("cat", fraction=0.25, guidance="own"))
    assert rows == [4] * 2 + [2] * 6
    rows.clear()
    _draw(small, engine.DCI("cat", fraction=0.25), guidance_scale=1.0)
    assert rows == [2] * 2 + [1] * 6
    rows.clear()
    _draw(small, [engine.DCI("cat", fraction=0.25), engine.DCI("cat", fraction=0.5)], images_per_prompt=2)
    assert rows == [6] * 2 + [5] * 2 + [4] * 4


def test_no_mixing_is_the_base_to_the_bit(small: engine.Engine) -> None:
    assert torch.equal(_draw(small, engine.DCI("cat", fraction=0.0)).latents, _draw(small).latents)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "euler_ancestral"])
def test_every_kind_of_request_shares_a_batch(small: engine.Engine, sampler: str) -> None:
    widths = {name: attn2.to_v.in_features for name, attn2 in small.unet.cross_attentions.items()}
    generator = torch.Generator().manual_seed(0)
    cat = engine.Concept("cat", {name: 9 * torch.randn(width, generator=generator) for name, width in widths.items()})
    customizations = [
        None,
        engine.DCI("cat", fraction=0.5),
        engine.Infusion([cat]),
        engine.DCI("teapot", "mug", strength=-1.0, fraction=0.25, guidance="own", noise="independent"),
        engine.Infusion([cat], foundation="shared"),
    ]
    together = _draw(small, customizations, images_per_prompt=5, seed=range(10, 15), sampler=sampler)
    alone = [_draw(small, one, seed=10 + i, sampler=sampler).latents for i, one in enumerate(customizations)]
    assert relative_error(together.latents, torch.cat(alone)) <= 1e-5
    assert [picture is not None for picture in together.foundation_images] == [False, False, True, False, False]


def test_strengths_per_image(small: engine.Engine) -> None:
    strengths = [-1.0, 0.0, 2.0]
    together = _draw(small, engine.DCI("cat", strength=strengths), images_per_prompt=3, seed=[3] * 3)
    alone = [_draw(small, engine.DCI("cat", strength=strength)).latents for strength in strengths]
    assert relative_error(together.latents, torch.cat(alone)) <= 1e-5
    assert [one["strength"] for one in together.settings["customizations"]] == strengths
    assert not torch.equal(alone[0], alone[2])


def test_matched_cost(small: engine.Engine) -> None:
    out = _draw(small, engine.DCI("cat", fraction=0.25, match_cost=True), steps=20)
    assert out.settings["steps"] == 16  # of which 4 count twice
    with pytest.raises(ValueError, match=r"match_cost must leave all images .* the same steps, got \[16, 20\]"):
        _draw(small, [None, engine.DCI("cat", fraction=0.25, match_cost=True)], images_per_prompt=2, steps=20)


def test_prompts_of_the_branches(small: engine.Engine) -> None:
    for prompt, stand_in, expected in (
        ("a cat", "owl", "an owl"),
        ("An owl on a (Cat:1.2)", "dog", "An owl on a dog"),
        ("the cat, cats and concatenation", "dog", "the dog, cats and concatenation"),
    ):
        assert replace_phrase(parse_weights(prompt), engine.DCI("cat", stand_in)).text == expected
    branches = make_branches("a dog chases a cat", engine.DCI("cat", "dog"), Texts(small.text_encoder))
    assert [text.prompt.text for text in branches.texts] == ["a dog chases a cat", "a dog chases a dog"]
    ids = [small.text_encoder.tokenize(text.prompt).ids for text in branches.texts]
    assert len(branches.chosen[1]) == branches.lengths[1] - 1
    last_dog = max(i for i, token in enumerate(ids[1]) if token == ids[0][2])
    assert last_dog not in branches.chosen[1]
    assert 2 in branches.chosen[1]  # the other dog


def test_weighting_marks_do_not_hide_the_concept(small: engine.Engine) -> None:
    """They may stand within its name; the noun in its place has the mean weight of what it replaces."""
    toy = engine.Concept("toy", tokens=torch.randn(2, 32), placeholder="V*")
    for dci, prompt, text, weight in (
        (engine.DCI(toy, "owl"), "a photo of a (V*:1.2) toy in snow", "a photo of an owl in snow", (2 * 1.2 + 4) / 6),
        (engine.DCI(toy, "owl"), "(a V* toy:1.5) in snow", "an owl in snow", 1.5),
        (engine.DCI("teddy bear", "owl"), "a (teddy:1.2) bear", "an owl", (5 * 1.2 + 5) / 10),
        (engine.DCI("cat", "dog"), "the [cat] sleeps", "the dog sleeps", 1 / 1.1),
    ):
        branches = make_branches(prompt, dci, Texts(small.text_encoder))
        auxiliary = branches.texts[1].prompt
        assert auxiliary.text == text
        noun = text.index(dci.auxiliary)
        assert auxiliary.weights[noun : noun + len(dci.auxiliary)] == pytest.approx([weight] * len(dci.auxiliary))
        assert len(auxiliary.weights) == len(text)
        assert branches.chosen[0]
    _draw(small, engine.DCI("teddy bear", "owl"), prompt="a (teddy:1.2) bear")


def test_halves_of_a_step_round_up() -> None:
    for fraction, steps, expected in (
        (0.15, 30, 5), (0.15, 50, 8), (0.25, 2, 1), (0.29, 50, 15), (0.0, 50, 0), (1.0, 50, 50), (0.14, 50, 7),
    ):  # fmt: skip
        assert engine.DCI("cat", fraction=fraction).mixing_steps(steps) == expected
    assert engine.DCI("cat", fraction=0.6, match_cost=True).shortened(20) == 13  # 12.5


def test_independent_noise_is_other_noise(small: engine.Engine) -> None:
    assert auxiliary_seed(3) != auxiliary_seed(4) < 2**32
    start = torch.randn(1, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.randn(1, generator=torch.Generator().manual_seed(3 + 2**63)), start)  # which is why
    shared, independent = (_draw(small, engine.DCI("cat", fraction=1.0, noise=n)) for n in ("shared", "independent"))
    assert relative_error(independent.latents, shared.latents) > 1e-2


def test_nouns_of_known_categories_have_stand_ins_of_their_own() -> None:
    for noun, expected in (
        ("tiger", "dog"), ("Woman", "man"), ("golden retriever dog", "cat"), ("vase", "mug"), ("mug", "teapot"),
        ("sneaker", "shoe"), ("teddy bear", "toy"), ("barn", "house"), ("sunglasses", "glasses"), ("car", "boat"),
    ):  # fmt: skip
        assert engine.DCI(noun).auxiliary == expected
    with pytest.raises(ValueError, match="auxiliary_noun must be given for a noun of no known category, got 'gizmo'"):
        engine.DCI("gizmo")
    assert engine.DCI("gizmo", "widget").auxiliary == "widget"


def test_the_papers_subjects_have_a_category() -> None:
    """The classes of DreamBooth's thirty subjects and of Custom Diffusion's ten."""
    dreambooth = (
        "backpack, stuffed animal, bowl, can, candle, cat, clock, sneaker, dog, toy, boot, cartoon, glasses, vase"
    )
    custom_diffusion = "barn, cat, chair, dog, flower, table, teddybear, tortoise plushy, pot, teapot"
    for noun in (*dreambooth.split(", "), *custom_diffusion.split(", ")):
        assert engine.DCI(noun).auxiliary != noun


def test_a_text_is_tokenized_once(small: engine.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    tokenize = small.text_encoder.tokenize
    monkeypatch.setattr(
        small.text_encoder,
        "tokenize",
        lambda prompt, *how: seen.append(prompt.text) or tokenize(prompt, *how),
    )
    _draw(small, engine.DCI("cat", fraction=0.5, guidance="own"), prompt="a cat in snow", attention_words=["snow"])
    assert sorted(seen) == ["", "a cat in snow", "a dog in snow"]


def test_the_auxiliary_noun_is_chosen_and_told(small: engine.Engine) -> None:
    for noun, expected in (("cat", "dog"), ("dog", "cat"), ("teapot", "mug"), ("backpack", "handbag")):
        assert engine.DCI(noun).auxiliary == expected
    told = _draw(small, engine.DCI("cat")).settings["customizations"][0]
    assert (told["auxiliary_noun"], told["preset"], told["token_scale"], told["gain"]) == ("dog", "calibrated", 10, 500)


def test_bad_settings_are_refused(small: engine.Engine) -> None:
    for arguments, message in (
        ({"concept_or_noun": ""}, "concept_or_noun must be a word"),
        ({"auxiliary_noun": " "}, "auxiliary_noun must be a word or words, got ' '"),
        ({"auxiliary_noun": 3}, "auxiliary_noun must be a word or words, got 3"),
        ({"auxiliary_noun": "Cat"}, "auxiliary_noun must differ from the concept's noun"),
        ({"strength": float("nan")}, "strength must be a finite number"),
        ({"strength": []}, "got an empty list"),
        ({"fraction": 1.5}, "fraction must be a finite number from 0 to 1"),
        ({"preset": "printed"}, "preset must be one of calibrated, paper"),
        ({"guidance": "none"}, "guidance must be one of shared, own"),
        ({"noise": "same"}, "noise must be one of shared, independent"),
        ({"gain": -1.0}, "gain must be a finite number >= 0"),
        ({"masked": 1}, "masked must be True or False"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.DCI(**({"concept_or_noun": "cat"} | arguments))
    with pytest.raises(ValueError, match="the prompt must contain 'dog'"):
        _draw(small, engine.DCI("dog"))
    with pytest.raises(ValueError, match=r"strength must be one, or one per image \(1\), got 2"):
        _draw(small, engine.DCI("cat", strength=[1.0, 2.0]))
    with pytest.raises(ValueError, match="preset must be the same for all DCI images"):
        _draw(small, [engine.DCI("cat"), engine.DCI("cat", preset="paper")], images_per_prompt=2)


def test_masks_are_recorded(small: engine.Engine) -> None:
    customizations = [
        None,
        engine.DCI("cat", "dog", fraction=0.25),
        engine.DCI("cat", "dog", fraction=0.5, strength=-2.0),
    ]
    options = {"images_per_prompt": 3, "seed": [3] * 3, "output": "pil"}
    out = _draw(small, customizations, record_masks=True, **options)
    assert out.masks is not None
    assert [masks is not None for masks in out.masks] == [False, True, True]
    short, long = out.masks[1:]
    assert list(short.layers) == list(small.unet.cross_attentions)
    for name, maps in short.layers.items():
        assert len(maps) == 2
        assert len(long.layers[name]) == 4
        sums = torch.from_numpy(maps).flatten(2).sum(dim=-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))
        torch.testing.assert_close(
            torch.from_numpy(maps[0]), torch.from_numpy(long.layers[name][0])
        )  # nothing differs yet
    assert short.sizes == [(8, 8), (4, 4)]
    assert short.figure(out.images[1]).size == (3 * 16, 16)
    plain = _draw(small, customizations, **options)
    assert plain.masks is None
    assert relative_error(out.latents, plain.latents) == 0
    with pytest.raises(ValueError, match=r"size must be a layer's, one of \[\(8, 8\), \(4, 4\)\]"):
        short.heat_map((2, 2))
    with pytest.raises(ValueError, match="record_masks needs an image that mixes"):
        _draw(small, record_masks=True)
