"""Texts of different lengths in one batch are what each is alone; and the phases of prompts that change."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import engine
from benchmarks.systems import default_request
from engine.kernels.attention import attention_ref
from engine.kernels.cross_attention import cross_attention_ref
from engine.kernels.dbim import dbim_ref
from engine.methods.concept_cache import Texts
from engine.sampling.keys import chunk_kind, own_first, repeated_gates
from engine.sampling.plan import lay_out, make_plans
from tests.pipelines import random_concept, relative_error

_TWO = "a photo of a cat " + "on a red beach " * 18 + "with a teapot"
_THREE = "a photo of a cat " + "on a blue beach in the snow " * 24
_OPTIONS = {"steps": 4, "output": "latent", "progress": False}


def _sharp(sd: engine.Engine) -> engine.Engine:
    """A model that hears its text: random weights hardly do otherwise."""
    for attn2 in sd.unet.cross_attentions.values():
        for projection in (attn2.to_k, attn2.to_v, attn2.to_q):
            projection.weight.data *= 4
    return sd


@pytest.fixture(scope="module")
def sd(small_folder) -> engine.Engine:
    return _sharp(engine.load(small_folder))


@pytest.mark.parametrize("times", [2, 3])
def test_repeated_keys_are_as_the_keys(times: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 30, 24), torch.randn(2, 11, 24), torch.randn(2, 11, 24)
    many = k.repeat(1, times, 1), v.repeat(1, times, 1)
    assert relative_error(attention_ref(q, *many, 3), attention_ref(q, k, v, 3)) <= 1e-6
    tokens = torch.tensor([[0, 3], [2, 10]])
    for found, expected, factor in zip(
        cross_attention_ref(q, *many, tokens, 3), cross_attention_ref(q, k, v, tokens, 3), (1, times), strict=True
    ):
        assert relative_error(factor * found, expected) <= 1e-6
    chosen, lengths = torch.zeros(2, 11, dtype=torch.bool), torch.tensor([7, 8])
    chosen[0, 2] = chosen[1, 3:6] = True
    gates = torch.tensor([[1.5, 10.0, 10.0, 500.0]])
    padded = torch.nn.functional.pad(chosen, (0, (times - 1) * 11))
    for logits in (False, True):
        expected = dbim_ref(q, k, v, chosen, lengths, gates, 3, logits)
        found = dbim_ref(q, *many, padded, lengths, repeated_gates(gates, times), 3, logits)
        assert relative_error(found, expected) <= 1e-6
    assert float(gates[0, 1]) == 10.0, "gates are the plan's own"


def test_own_first(small: engine.Engine) -> None:
    tokens = small.text_encoder.tokenize("a cat BREAK red")
    order = own_first(tokens)
    assert order[:4] == [0, 1, 2, 78]
    assert sorted(order) == list(range(154))


def _kinds(sd: engine.Engine) -> list[Any]:
    concepts = [engine.Concept(noun, random_concept(sd, seed).residuals) for seed, noun in enumerate(("cat", "beach"))]
    return [
        None,
        engine.Infusion(concepts[:1]),
        engine.Infusion(concepts[:1], foundation="shared"),
        engine.Infusion(concepts[:1], unconditional_maps="own"),
        engine.DCI("cat", "dog", fraction=0.5),
    ]


@pytest.mark.parametrize("kind", range(5))
def test_images_of_other_lengths_change_nothing(sd: engine.Engine, kind: int) -> None:
    """One request of texts of one, two and three chunks."""
    custom = _kinds(sd)[kind]
    prompts = ["a photo of a cat", _TWO, _THREE, "a cat beside a boat"]
    negatives = ["", "blue", "a " + "blue car " * 40, "red " * 80]
    words = ["cat"]
    out = sd.generate(
        prompts, negative_prompt=negatives, seed=[1, 2, 3, 4], customization=custom, attention_words=words, **_OPTIONS
    )
    for i, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        alone = sd.generate(
            prompt, negative_prompt=negative, seed=i + 1, customization=custom, attention_words=words, **_OPTIONS
        )
        assert relative_error(out.latents[i], alone.latents[0]) <= 1e-5
        if custom is None:
            for name, maps in out.attention.layers.items():
                ours, theirs = (
                    torch.tensor(one.astype(np.float32)) for one in (maps[i], alone.attention.layers[name][0])
                )
                assert relative_error(ours, theirs) <= 2e-3, "float16"


def test_a_shared_foundation_does_not_depend_on_who_shares_it(sd: engine.Engine) -> None:
    """The follower's own unconditional row has as many keys beside a plain image of the same prompt as alone."""
    custom = _kinds(sd)[3]
    out = sd.generate([_TWO] * 2, negative_prompt="a blue car", seed=[1, 1], customization=[None, custom], **_OPTIONS)
    alone = sd.generate(_TWO, negative_prompt="a blue car", seed=1, customization=custom, **_OPTIONS)
    assert relative_error(out.latents[1], alone.latents[0]) <= 1e-5


def test_chunks_of_requests_that_join(small: engine.Engine) -> None:
    texts = Texts(small.text_encoder)
    four = " BREAK ".join(["a cat"] * 4)
    for prompt, kind in (("a cat", 4), (_TWO, 4), (four, 4), (_THREE, 3), (f"{four} BREAK red", 5)):
        ((_, layout),) = lay_out(default_request(small, prompt), 3, texts)
        assert chunk_kind(layout) == kind


def _plans(sd: engine.Engine, prompt: str, **options: Any):
    request = default_request(sd, prompt, **options)
    steps = len(sd.timetables("ddim", request.options.steps, 0.0, request.begin, None))
    return make_plans(request, steps, Texts(sd.text_encoder), sd.concepts, sd.device)


def test_phases_of_a_prompt_that_changes(small: engine.Engine) -> None:
    assert [one.steps for one in _plans(small, "a [cat:dog:0.3]", steps=10)] == [3, 7]
    assert [one.steps for one in _plans(small, "a [cat]", steps=10)] == [10]
    both = _plans(small, "a [cat:cat in snow:0.6]", steps=10, customization=engine.DCI("cat", fraction=0.3))
    assert [one.steps for one in both] == [3, 3, 4]
    picture = np.zeros((16, 16, 3), dtype=np.uint8)
    assert [one.steps for one in _plans(small, "[a:b:0.2]", steps=10, image=picture, strength=0.5)] == [2, 3]
    assert [one.steps for one in _plans(small, "[a:b:0.5]", steps=10, image=picture, strength=0.5)] == [5]


def test_phases_that_differ_in_nothing_share_their_rows(small: engine.Engine) -> None:
    plans = _plans(small, "a [cat|dog]", steps=50)
    assert [one.steps for one in plans] == [1] * 50
    assert len({id(one.rows) for one in plans}) == 2
    assert plans[0].rows is plans[48].rows


def test_texts_of_all_phases_have_as_many_keys(small: engine.Engine) -> None:
    """As in A1111, where the texts of one prompt are encoded together."""
    for plan in _plans(small, f"a [cat:{_TWO}:0.5]", steps=4, negative_prompt="red"):
        assert plan.rows.batch.text[0][0].shape[1] == 154
    short, _ = _plans(small, f"a [cat:{_TWO}:0.5]", steps=4)
    filled = small.encode_prompt(["a cat", _TWO])[:1]
    first = next(iter(small.unet.cross_attentions.values()))
    torch.testing.assert_close(short.rows.batch.text[0][0][1], first.to_k(filled)[0])


@pytest.mark.parametrize("prompt", ["a [dog:cat:2] on a beach", "a [cat|dog]"])
def test_a_noun_must_be_in_every_text(small: engine.Engine, prompt: str) -> None:
    for custom in (engine.Infusion([random_concept(small)]), engine.DCI("cat")):
        with pytest.raises(ValueError, match="must contain 'cat', got 'a dog"):
            small.generate(prompt, customization=custom, **_OPTIONS)


def test_a_noun_may_move(sd: engine.Engine) -> None:
    """Its place is that in the text of each phase."""
    custom = engine.Infusion([random_concept(sd)])
    seen: list[Tensor] = []

    def keep(_i: int, _n: int, latents: Tensor) -> None:
        seen.append(latents.clone())

    sd.generate("a [red :2]cat", seed=1, customization=custom, callback=keep, **_OPTIONS)
    before = sd.generate("a cat", seed=1, customization=custom, callback=keep, **_OPTIONS)
    assert relative_error(seen[1], seen[5]) <= 1e-6
    assert relative_error(seen[3], before.latents) > 1e-3


def test_an_edit_of_equal_texts_is_none(small: engine.Engine) -> None:
    edited, plain = (small.generate(prompt, seed=1, **_OPTIONS) for prompt in ("a [cat:cat:2]", "a cat"))
    assert torch.equal(edited.latents, plain.latents)
