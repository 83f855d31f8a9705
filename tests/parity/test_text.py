"""The text side against transformers' CLIP by hand and diffusers' pipeline: long prompts, layers left out, embeddings,
prompts that change over the steps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import engine
from engine.methods.concept_cache import Texts
from engine.methods.dci import make_branches
from engine.text.words import find_noun
from tests.parity import dci_reference, infusion_reference
from tests.parity.dci_reference import LiteralDCI, Side
from tests.parity.infusion_reference import LiteralInfusion, Residual
from tests.pipelines import SCHEDULERS, SD_V1_5_SCHEDULER, random_concept, relative_error, save_pipeline

_TOLERANCE = 2e-5
_STEPS = 6
_START = "a photo of a cat beside a boat " + "on a red beach " * 17
_LONG = _START + "with a teapot in the snow"  # the teapot is in the second chunk


@pytest.fixture
def both(tmp_path: Path):
    pipeline = save_pipeline("narrow", tmp_path, seed=5)
    for name, weight in pipeline.unet.named_parameters():
        if "attn2.to_" in name:
            weight.data *= 6  # random text hardly matters otherwise
    pipeline.unet.save_pretrained(tmp_path / "unet")
    return pipeline, engine.load(tmp_path)


@torch.no_grad()
def _by_hand(pipeline: Any, prompt: str, chunks: int) -> Tensor:
    """(1, chunks * 77, E): every 75 tokens between begin and end tokens, encoded apart, and empty chunks behind."""
    tokenizer = pipeline.tokenizer
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    parts = [ids[first : first + 75] for first in range(0, 75 * chunks, 75)]
    rows = [
        [tokenizer.bos_token_id, *part, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * (75 - len(part))]
        for part in parts
    ]
    assert len(ids) <= 75 * chunks
    return torch.cat([pipeline.text_encoder(torch.tensor([row])).last_hidden_state for row in rows], dim=1)


def _theirs(pipeline: Any, prompt: Tensor | str, negative: Tensor | str, **options: Any) -> Tensor:
    names = ("prompt_embeds", "negative_prompt_embeds") if isinstance(prompt, Tensor) else ("prompt", "negative_prompt")
    given = dict(zip(names, (prompt, negative), strict=True))
    shared = {"num_inference_steps": _STEPS, "guidance_scale": 5.0, "output_type": "latent"}
    return pipeline(**given, generator=torch.Generator().manual_seed(3), **(shared | options)).images


def _ours(sd: engine.Engine, prompt: str | list[str], **options: Any) -> engine.Result:
    shared = {"steps": _STEPS, "guidance_scale": 5.0, "seed": 3, "output": "latent", "progress": False}
    return sd.generate(prompt, **(shared | options))


def test_long_prompts(both, agrees) -> None:
    pipeline, sd = both
    longer = "a dog in the snow " * 40
    for prompt, chunks in ((_LONG, 2), (longer, 3)):
        feature = "prompts beyond 77 tokens, text encoder"
        error = relative_error(sd.encode_prompt(prompt), _by_hand(pipeline, prompt, chunks))
        agrees(feature, "CLIPTextModel, chunk by chunk", error, _TOLERANCE)
        for negative in ("", "a blue car"):
            expected = _theirs(pipeline, *(_by_hand(pipeline, text, chunks) for text in (prompt, negative)))
            error = relative_error(_ours(sd, prompt, negative_prompt=negative).latents, expected)
            agrees("prompts beyond 77 tokens, pictures", "StableDiffusionPipeline with prompt_embeds", error, 2e-4)
    cut = _ours(sd, " ".join(_LONG.split()[:60]), seed=3).latents
    assert relative_error(cut, _ours(sd, _LONG).latents) > 1e-3, "what is beyond matters"


def test_a_long_negative_prompt(both, agrees) -> None:
    pipeline, sd = both
    expected = _theirs(pipeline, *(_by_hand(pipeline, text, 2) for text in ("a cat", _LONG)))
    error = relative_error(_ours(sd, "a cat", negative_prompt=_LONG).latents, expected)
    agrees("prompts beyond 77 tokens, pictures", "StableDiffusionPipeline with prompt_embeds", error, 2e-4)


@pytest.mark.parametrize("foundation", ["parallel", "shared"])
def test_infusion_of_a_long_prompt(both, foundation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Concepts at tokens of both chunks, against maps written out."""
    pipeline, sd = both
    monkeypatch.setattr(infusion_reference, "encode", lambda pipeline, text: _by_hand(pipeline, text, 2))
    concepts = [_scaled(random_concept(sd, seed), noun) for seed, noun in ((1, "cat"), (2, "teapot"))]
    ids = pipeline.tokenizer(_LONG, add_special_tokens=False).input_ids
    places = [1 + i + 2 * (i // 75) for i in (ids.index(_id(pipeline, "cat")), ids.index(_id(pipeline, "teapot")))]
    assert places[1] > 77
    assert places == [find_noun(sd.text_encoder.tokenize(_LONG), one.noun)[-1] for one in concepts]
    residuals = [Residual(at, dict(one.residuals), "text") for at, one in zip(places, concepts, strict=True)]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    expected, _ = LiteralInfusion(pipeline)(_LONG, residuals, noise, _STEPS, 5.0, foundation, "foundation")
    out = _ours(sd, _LONG, customization=engine.Infusion(concepts, foundation=foundation))
    assert relative_error(out.latents, expected) <= 5e-4
    assert relative_error(_ours(sd, _LONG).latents, expected) > 1e-2


def test_maps_of_a_long_prompt(both) -> None:
    pipeline, sd = both
    literal = LiteralInfusion(pipeline)
    words, short = ["cat", "teapot"], "a cat and a teapot"
    out = _ours(sd, [short, _LONG], seed=[3, 3], steps=1, attention_words=words)
    pipeline.scheduler.set_timesteps(1)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    for i, (prompt, chunks) in enumerate(((short, 1), (_LONG, 2))):
        literal.predict(noise, pipeline.scheduler.timesteps[0], _by_hand(pipeline, prompt, chunks))
        ids = pipeline.tokenizer(prompt, add_special_tokens=False).input_ids
        for w, word in enumerate(words):
            at = ids.index(_id(pipeline, word))
            for name, maps in out.attention.layers.items():
                column = literal.maps[name][0][:, :, 1 + at + 2 * (at // 75)]  # (H, N)
                actual = torch.from_numpy(maps[i, 0, w].astype("float32")).flatten(1)
                assert relative_error(actual, column) <= 2e-3  # float16


def _scaled(concept: engine.Concept, noun: str) -> engine.Concept:
    return engine.Concept(noun, {name: 10 * residual for name, residual in concept.residuals.items()})


def _id(pipeline: Any, word: str) -> int:
    (id,) = pipeline.tokenizer(word, add_special_tokens=False).input_ids
    return id


class _LongDCI(LiteralDCI):
    """Masks among a prompt's own tokens, wherever its chunks have them; ``own`` is of both sides."""

    own: tuple[list[int], list[int]]

    def mask(self, logits: Tensor, weights: Tensor, side: Side) -> Tensor:
        own = self.own[side is self.other]
        if self.preset == "paper":
            return super().mask(logits, weights, side)
        shares = (10.0 * weights[..., own]).softmax(dim=-1)
        total = sum(shares[..., own.index(position)] for position in side.chosen)
        return 500.0 * (10.0 * total).softmax(dim=-1)


@pytest.mark.parametrize("noun", ["cat", "teapot"])
@pytest.mark.parametrize("preset", ["calibrated", "paper"])
def test_dci_of_a_long_prompt(both, preset: str, noun: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, sd = both
    monkeypatch.setattr(dci_reference, "encode", lambda pipeline, text: _by_hand(pipeline, text, 2))
    other = _LONG.replace(noun, "dog")
    ids = [pipeline.tokenizer(text, add_special_tokens=False).input_ids for text in (_LONG, other)]
    places = [[1 + i + 2 * (i // 75) for i in range(len(own))] for own in ids]
    chosen = [places[0][ids[0].index(_id(pipeline, noun))]]
    others = [at for at, id in zip(places[1], ids[1], strict=True) if id != _id(pipeline, "dog")]
    dci = engine.DCI(noun, "dog", fraction=0.5, preset=preset, strength=1.5)
    branches = make_branches(_LONG, dci, Texts(sd.text_encoder))
    assert branches.chosen == (chosen, others)
    literal = _LongDCI(pipeline)
    literal.own = (places[0], places[1])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    expected = literal(
        (_LONG, other),
        (Side(chosen, len(ids[0])), Side(others, len(ids[1]))),
        (noise, noise),
        steps=_STEPS,
        mixing_steps=_STEPS // 2,
        guidance_scale=5.0,
        strength=1.5,
        preset=preset,
        guidance="shared",
    )
    assert relative_error(_ours(sd, _LONG, customization=dci).latents, expected) <= 5e-4
    assert relative_error(_ours(sd, _LONG).latents, expected) > 2e-3


def test_clip_skip(both, agrees) -> None:
    """For both prompts; the pipeline's own argument leaves the negative one alone, so it is given what it encodes."""
    pipeline, sd = both
    object.__setattr__(pipeline.text_encoder, "text_model", pipeline.text_encoder)  # where diffusers 0.42 looks for it
    prompts = ["a photo of a red cat", "blue"]
    for clip_skip in (0, 1):
        expected = pipeline.encode_prompt(prompts, "cpu", 1, False, clip_skip=clip_skip)[0]
        error = relative_error(sd.encode_prompt(prompts, clip_skip=clip_skip), expected)
        agrees("`clip_skip`, text encoder", "StableDiffusionPipeline.encode_prompt", error, _TOLERANCE)
        alone = _ours(sd, prompts[0], guidance_scale=1.0, clip_skip=clip_skip).latents
        theirs = _theirs(pipeline, prompts[0], "", guidance_scale=1.0, clip_skip=clip_skip)
        agrees("`clip_skip`, pictures", "StableDiffusionPipeline", relative_error(alone, theirs), 2e-4)
        out = _ours(sd, prompts[0], negative_prompt=prompts[1], clip_skip=clip_skip)
        theirs = _theirs(pipeline, expected[:1], expected[1:])
        agrees("`clip_skip`, pictures", "StableDiffusionPipeline", relative_error(out.latents, theirs), 2e-4)
        assert out.settings["clip_skip"] == clip_skip
    assert "Clip skip: 2" in out.parameters(0)
    assert relative_error(_ours(sd, prompts[0], negative_prompt=prompts[1]).latents, theirs) > 1e-3


def test_embeddings(both, tmp_path: Path, agrees) -> None:
    """Several vectors, in both prompts; one name begins with the other."""
    pipeline, sd = both
    width = pipeline.text_encoder.config.hidden_size
    torch.manual_seed(0)
    save_file({"<toy>": torch.randn(3, width)}, tmp_path / "learned.safetensors")
    save_file({"emb_params": torch.randn(1, width)}, tmp_path / "bad.safetensors")
    sd = engine.load(
        tmp_path, embeddings={"<toy>": tmp_path / "learned.safetensors", "Badly": tmp_path / "bad.safetensors"}
    )
    pipeline.load_textual_inversion(tmp_path / "learned.safetensors")
    pipeline.load_textual_inversion(tmp_path / "bad.safetensors", token="badly")
    for prompt, negative in (("a photo of a <toy> on a beach", "badly drawn, blue"), ("badly <toy>", "a <toy>")):
        out = _ours(sd, prompt, negative_prompt=negative)
        error = relative_error(out.latents, _theirs(pipeline, prompt, negative))
        agrees("`embeddings`, pictures", "load_textual_inversion", error, 2e-4)
        assert out.settings["embeddings"] == ["<toy>", "badly"]
    plain = engine.load(tmp_path)
    assert relative_error(_ours(plain, prompt, negative_prompt=negative).latents, out.latents) > 1e-2


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "euler_ancestral"])
@pytest.mark.parametrize(
    ("prompt", "negative", "texts", "negatives"),
    [
        ("a [cat:dog:0.5] here", "", ["a cat here"] * 3 + ["a dog here"] * 3, [""] * 6),
        ("a cat[ in the snow:2]", "[blue::0.7]", ["a cat"] * 2 + ["a cat in the snow"] * 4, ["blue"] * 4 + [""] * 2),
        ("a [cat|dog|boat]", "[red|]", ["a cat", "a dog", "a boat"] * 2, ["red", ""] * 3),
    ],
)
def test_prompts_that_change(
    both, sampler: str, prompt: str, negative: str, texts: list[str], negatives: list[str], agrees
) -> None:
    """A pipeline whose embeddings a callback replaces after every step."""
    pipeline, sd = both
    scheduler, options = SCHEDULERS[sampler]
    pipeline.scheduler = scheduler.from_config(SD_V1_5_SCHEDULER, **options)
    pairs = [torch.cat([_by_hand(pipeline, text, 1) for text in pair]) for pair in zip(negatives, texts, strict=True)]

    def change(_pipeline: Any, i: int, _t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["prompt_embeds"] = pairs[min(i + 1, _STEPS - 1)]
        return tensors

    expected = _theirs(
        pipeline, pairs[0][1:], pairs[0][:1],
        callback_on_step_end=change, callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )  # fmt: skip
    error = relative_error(_ours(sd, prompt, negative_prompt=negative, sampler=sampler).latents, expected)
    agrees("prompts that change over the steps", "StableDiffusionPipeline with callback_on_step_end", error, 2e-4)
    fixed = _ours(sd, texts[0], negative_prompt=negatives[0], sampler=sampler).latents
    assert relative_error(fixed, expected) > 1e-3
