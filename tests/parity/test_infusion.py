"""Infusion against a literal reference in diffusers' modules, and the method's invariants."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import engine
from engine.text.words import find_noun
from tests.parity.infusion_reference import LiteralInfusion, Residual
from tests.pipelines import relative_error, save_pipeline

_PROMPT = "a photo of a cat beside a teapot on a beach"
_STEPS = 6


def _concept(sd: engine.Engine, noun: str, space: str = "text", seed: int = 0, size: float = 10.0) -> engine.Concept:
    generator = torch.Generator().manual_seed(seed)
    residuals = {}
    for name, attn2 in sd.unet.cross_attentions.items():
        width = attn2.to_v.in_features if space == "text" else attn2.to_v.out_features
        residuals[name] = size * torch.randn(width, generator=generator)
    return engine.Concept(noun=noun, residuals=residuals, space=space)


def _draw(sd: engine.Engine, customization=None, prompt=_PROMPT, seed=3, **options) -> engine.Result:
    settings = {"steps": _STEPS, "guidance_scale": 5.0, "output": "latent", "progress": False} | options
    return sd.generate(prompt, customization=customization, seed=seed, **settings)


@pytest.fixture(scope="module", params=["narrow", "deep_heads_per_block"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp(request.param)
    pipeline = save_pipeline(request.param, folder, seed=5)
    return engine.load(folder), LiteralInfusion(pipeline)


@pytest.mark.parametrize("unconditional_maps", ["foundation", "own"])
@pytest.mark.parametrize("foundation", ["parallel", "shared"])
@pytest.mark.parametrize("space", ["text", "value"])
def test_final_latents(both, space: str, foundation: str, unconditional_maps: str) -> None:
    sd, literal = both
    concepts = [_concept(sd, "teapot", space, seed=1), _concept(sd, "cat", space, seed=2)]
    tokens = sd.text_encoder.tokenize(_PROMPT)
    residuals = [Residual(find_noun(tokens, c.noun)[-1], dict(c.residuals), space) for c in concepts]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    custom = engine.Infusion(concepts, foundation=foundation, unconditional_maps=unconditional_maps)
    out = _draw(sd, custom)
    expected, expected_foundation = literal(_PROMPT, residuals, noise, _STEPS, 5.0, foundation, unconditional_maps)
    assert relative_error(out.latents, expected) <= 5e-4
    assert relative_error(_draw(sd).latents, expected) > 1e-2  # the concepts do something
    if expected_foundation is None:
        assert out.foundation_images is None
    else:
        assert relative_error(out.foundation_images[0], expected_foundation[0]) <= 5e-4


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral"])
def test_zero_residual_is_the_foundation_to_the_bit(small: engine.Engine, sampler: str, guidance_scale: float) -> None:
    zero = _concept(small, "cat", size=0.0)
    out = _draw(small, engine.Infusion([zero]), guidance_scale=guidance_scale, sampler=sampler)
    assert torch.equal(out.latents, torch.stack(out.foundation_images))
    plain = _draw(small, guidance_scale=guidance_scale, sampler=sampler)  # in a smaller batch, which rounds otherwise
    assert relative_error(out.latents, plain.latents) <= 1e-5


def test_zero_residual_on_a_shared_foundation(small: engine.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    predictions = []
    denoise = small.unet.denoise
    monkeypatch.setattr(small.unet, "denoise", lambda x, c: predictions.append(denoise(x, c)) or predictions[-1])
    _draw(small, engine.Infusion([_concept(small, "cat", size=0.0)], foundation="shared"))
    assert len(predictions) == _STEPS
    for _unconditional, foundation, customised in predictions:
        assert torch.equal(foundation, customised)


def test_the_foundation_is_untouched(small: engine.Engine) -> None:
    before = _draw(small).latents
    one, other = (_draw(small, engine.Infusion([_concept(small, "cat", seed=seed)])) for seed in (1, 2))
    assert not torch.equal(one.latents, other.latents)
    assert torch.equal(one.foundation_images[0], other.foundation_images[0])
    assert relative_error(one.foundation_images[0], before[0]) <= 1e-5
    assert torch.equal(_draw(small).latents, before)


def test_order_does_not_matter(small: engine.Engine) -> None:
    concepts = [_concept(small, "cat", seed=1), _concept(small, "teapot", seed=2)]
    one, other = (_draw(small, engine.Infusion(order)).latents for order in (concepts, concepts[::-1]))
    assert torch.equal(one, other)


def _each_alone(sd: engine.Engine, customizations: list, **options) -> Tensor:
    return torch.cat([_draw(sd, custom, **options).latents for custom in customizations])


def test_kinds_of_requests_share_a_batch(small: engine.Engine) -> None:
    cat, teapot = _concept(small, "cat", seed=1), _concept(small, "teapot", "value", seed=2)
    customizations = [
        None,
        engine.Infusion([cat]),
        engine.Infusion([cat, teapot], foundation="shared"),
        engine.Infusion([teapot], unconditional_maps="own"),
    ]
    together = _draw(small, customizations, seed=[3] * 4, images_per_prompt=4)
    assert relative_error(together.latents, _each_alone(small, customizations)) <= 1e-5
    foundations = [picture is not None for picture in together.foundation_images]
    assert foundations == [False, True, False, True]


def test_sets_of_concepts_share_one_foundation(small: engine.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = [engine.Infusion([_concept(small, "cat", seed=seed)]) for seed in range(3)]
    rows = []
    denoise = small.unet.denoise
    monkeypatch.setattr(small.unet, "denoise", lambda x, c: rows.append(len(c.shifts)) or denoise(x, c))
    together = _draw(small, sets, seed=[3] * 3, images_per_prompt=3, steps=2)
    assert rows == [2 + 2 * 3] * 2
    assert relative_error(together.latents, _each_alone(small, sets, steps=2)) <= 1e-5
    rows.clear()
    _draw(
        small,
        [engine.Infusion(one.concepts, foundation="shared") for one in sets[:2]],
        seed=[3, 3],
        images_per_prompt=2,
        steps=1,
    )
    assert rows == [2 * 3]


def test_a_bad_noun_is_refused(small: engine.Engine) -> None:
    cat = engine.Infusion([_concept(small, "cat")])
    with pytest.raises(ValueError, match="must contain 'cat', got 'a dog with scattered cats'"):
        _draw(small, cat, prompt="a dog with scattered cats")
    with pytest.raises(ValueError, match="2 times; say which with occurrences, got 'a cat and a cat'"):
        _draw(small, cat, prompt="a cat and a cat")
    with pytest.raises(ValueError, match="'cat' must be within the text encoder's 77 tokens; it was cut off from"):
        _draw(small, cat, prompt="word " * 90 + "cat", long_prompts="truncate")
    with pytest.raises(ValueError, match="has 'cat' 2 times, got occurrence 2"):
        _draw(small, engine.Infusion(cat.concepts, occurrences=[2]), prompt="a cat and a cat")
    first, second = (
        _draw(small, engine.Infusion(cat.concepts, occurrences=[i]), prompt="a (Cat:1.1) and a cat").latents
        for i in (0, 1)
    )
    assert not torch.equal(first, second)


def test_nouns_of_several_tokens(small: engine.Engine) -> None:
    tokens = small.text_encoder.tokenize("a xylophonist here")
    positions = find_noun(tokens, "xylophonist")
    assert len(positions) > 1
    spelled = "".join(small.text_encoder.tokenizer.convert_ids_to_tokens([tokens.ids[i] for i in positions]))
    assert spelled.removesuffix("</w>") == "xylophonist"
    concept = _concept(small, "xylophonist")
    last, every = (
        _draw(small, engine.Infusion([concept], tokens=which), prompt="a xylophonist here").latents
        for which in ("last", "all")
    )
    assert not torch.equal(last, every)


def test_bad_customisations_are_refused(small: engine.Engine) -> None:
    cat = _concept(small, "cat")
    for arguments, message in (
        ({"concepts": []}, "concepts must be a list of at least one"),
        ({"concepts": cat}, "concepts must be a list"),
        ({"concepts": [cat], "foundation": "both"}, "foundation must be one of parallel, shared"),
        ({"concepts": [cat], "unconditional_maps": "none"}, "unconditional_maps must be one of"),
        ({"concepts": [cat], "tokens": "first"}, "tokens must be one of last, all"),
        ({"concepts": [cat], "occurrences": [0, 1]}, r"occurrences must be one per concept \(1\), got 2"),
        ({"concepts": [cat], "occurrences": [-1]}, "occurrences must hold integers >= 0 or None, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.Infusion(**arguments)
    with pytest.raises(ValueError, match=r"customization must be one, or one per image \(1\), got 2"):
        _draw(small, [None, None])


def test_a_concept_of_another_model_is_refused(small: engine.Engine) -> None:
    residuals = dict(_concept(small, "cat").residuals)
    first = next(iter(residuals))
    for changed, message in (
        ({**residuals, first: torch.zeros(7)}, "text width is 32, found 7"),
        ({name: residuals[name] for name in residuals if name != first}, f"missing {first}"),
        ({**residuals, "mid_block.attn9": torch.zeros(32)}, "no cross-attention layer mid_block.attn9"),
    ):
        with pytest.raises(engine.ConceptFileError, match=message):
            _draw(small, engine.Infusion([engine.Concept("cat", changed)]))


def test_projections_are_kept_as_long_as_their_concept(small: engine.Engine) -> None:
    concept = _concept(small, "cat")
    _draw(small, engine.Infusion([concept]), steps=1)
    kept = len(small.concepts)
    _draw(small, engine.Infusion([concept]), steps=1)
    assert len(small.concepts) == kept
    del concept
    assert len(small.concepts) == kept - 1
