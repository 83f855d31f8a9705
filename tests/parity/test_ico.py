"""ICO concepts against diffusers with the same numbers put into its weights, alone, with DCI and from its files."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from safetensors.torch import save_file
from torch import Tensor

import engine
from engine.methods.concept import Change, Concept
from engine.methods.concept_cache import Text, Texts, placeholders
from engine.methods.dci import make_branches
from engine.text.weighting import parse_weights
from tests.parity.dci_reference import LiteralDCI, Side
from tests.pipelines import relative_error, save_pipeline

_PROMPT = "a photo of a V* cat beside a teapot on a beach"
_SPELLED = "a photo of a <v0> <v1> <v2> cat beside a teapot on a beach"
_AUXILIARY = "a photo of a dog beside a teapot on a beach"
_OPTIONS = {"steps": 4, "guidance_scale": 5.0, "output": "latent", "progress": False}


def _concept(sd: engine.Engine, seed: int = 0, size: float = 0.3, **changes) -> Concept:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        f"{name}.{projection}": getattr(attn2, projection).weight
        for name, attn2 in sd.unet.cross_attentions.items()
        for projection in ("to_k", "to_v")
    }
    drawn = {
        name: Change(size * weight.std() * torch.randn(weight.shape, generator=generator))
        for name, weight in weights.items()
    }
    tokens = torch.randn(3, sd.text_encoder.width, generator=generator)
    return Concept("cat", **({"tokens": tokens, "changes": drawn} | changes))


def _spell(pipeline, tokens: Tensor) -> None:
    """Put vectors into the vocabulary as <v0>, <v1>, ..."""
    names = [f"<v{i}>" for i in range(len(tokens))]
    pipeline.tokenizer.add_tokens(names)
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer), mean_resizing=False)
    ids = pipeline.tokenizer.convert_tokens_to_ids(names)
    pipeline.text_encoder.get_input_embeddings().weight.data[ids] = tokens


def _text_kv(sd: engine.Engine, text: Text):
    return sd.concepts.text_kv([text], Texts(sd.text_encoder).encode([text], "a1111"))


@pytest.fixture
def both(tmp_path: Path):
    """An Engine, its concept, and a pipeline with the concept in its weights."""
    pipeline = save_pipeline("narrow", tmp_path, seed=5)
    for name, weight in pipeline.unet.named_parameters():
        if "attn2.to_" in name:
            weight.data *= 6  # random text hardly matters otherwise
    pipeline.save_pretrained(tmp_path)
    sd = engine.load(tmp_path)
    concept = _concept(sd)
    _spell(pipeline, concept.tokens)
    for name, change in concept.changes.items():
        pipeline.unet.get_submodule(name).weight.data += change.up
    return sd, concept, pipeline


def _theirs(pipeline, prompt: str, seed: int = 3) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "latent"}
    return pipeline(prompt, generator=generator, **options).images


def test_final_latents(both) -> None:
    sd, concept, pipeline = both
    drawn = sd.generate(_PROMPT, seed=3, customization=engine.ICO([concept]), **_OPTIONS)
    plain = sd.generate("a photo of a cat beside a teapot on a beach", seed=3, **_OPTIONS)
    expected = _theirs(pipeline, _SPELLED)
    assert relative_error(drawn.latents, expected) <= 5e-5
    assert relative_error(plain.latents, expected) > 0.01
    assert drawn.settings["customizations"] == [
        {"method": "ico", "concepts": [{"name": "cat", "noun": "cat", "placeholder": "V*"}]}
    ]


@pytest.mark.parametrize("fraction", [0.5, 1.0])
@pytest.mark.parametrize(("preset", "guidance"), [("calibrated", "shared"), ("calibrated", "own"), ("paper", "shared")])
def test_final_latents_with_two_branches(both, preset: str, guidance: str, fraction: float) -> None:
    sd, concept, pipeline = both
    dci = engine.DCI(concept, "dog", strength=1.5, fraction=fraction, preset=preset, guidance=guidance)
    branches = make_branches(_PROMPT, dci, Texts(sd.text_encoder))
    ids = pipeline.tokenizer(_SPELLED, add_special_tokens=False).input_ids
    names = pipeline.tokenizer.convert_tokens_to_ids(["<v0>", "<v1>", "<v2>"])
    concept_at = [1 + i for i, token in enumerate(ids) if token in names]
    concept_at.append(concept_at[-1] + 1)  # the noun
    assert branches.chosen[0] == concept_at
    assert branches.texts[1].prompt.text == _AUXILIARY
    assert branches.lengths[0] == len(ids)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    expected = LiteralDCI(pipeline)(
        (_SPELLED, _AUXILIARY),
        (Side(concept_at, len(ids)), Side(branches.chosen[1], branches.lengths[1])),
        (noise, noise),
        steps=4,
        mixing_steps=round(fraction * 4),
        guidance_scale=5.0,
        strength=1.5,
        preset=preset,
        guidance=guidance,
    )
    drawn = sd.generate(_PROMPT, seed=3, customization=dci, **_OPTIONS)
    assert relative_error(drawn.latents, expected) <= 5e-4


def test_every_kind_shares_a_batch(both) -> None:
    sd, concept, _ = both
    generator = torch.Generator().manual_seed(1)
    widths = {name: attn2.to_v.in_features for name, attn2 in sd.unet.cross_attentions.items()}
    residuals = {name: torch.randn(width, generator=generator) for name, width in widths.items()}
    other = replace(_concept(sd, seed=2), placeholder="W*")
    kinds = [
        (None, "a photo of a cat"),
        (engine.Infusion([Concept("cat", residuals)]), "a photo of a cat"),
        (engine.ICO([concept]), "a V* cat on a beach"),
        (engine.ICO([other]), "a teapot and W*"),
        (engine.DCI(concept, "dog", fraction=0.5), "a V* cat on a beach"),
        (engine.DCI("teapot", fraction=0.25), "a teapot"),
    ]
    before = sd.generate("a photo of a cat", seed=7, **_OPTIONS).latents
    weights = {name: weight.clone() for name, weight in sd.unet.state_dict().items()}
    together = sd.generate(
        [prompt for _, prompt in kinds], seed=[7] * 6, customization=[c for c, _ in kinds], **_OPTIONS
    )
    for row, (custom, prompt) in enumerate(kinds):
        alone = sd.generate(prompt, seed=7, customization=custom, **_OPTIONS).latents
        assert relative_error(together.latents[row : row + 1], alone) <= 1e-5
    assert torch.equal(sd.generate("a photo of a cat", seed=7, **_OPTIONS).latents, before)
    assert all(torch.equal(weight, weights[name]) for name, weight in sd.unet.state_dict().items())


def test_tokens_stand_where_words_would(both) -> None:
    sd, _, _ = both
    text = sd.text_encoder
    red = text.model.get_input_embeddings().weight[text.tokenize("red").ids[1]].detach()
    learned = Concept("cat", tokens=red[None], placeholder="<r>")
    for prompt in ("a {} cat", "{}", "a cat, {}!", "(a {}:1.3) cat"):
        spelled = text.tokenize(prompt.format("red"))
        tokens = text.tokenize(prompt.format("<r>"), placeholders([learned], text.width))
        assert torch.equal(text.encode([spelled]), text.encode([tokens]))
        assert len(tokens.learned) == 1
    assert text.tokenize("a <R> cat", placeholders([learned], text.width)).learned  # CLIP's text is in lower case
    same = sd.generate("a red cat", seed=0, **_OPTIONS).latents
    assert torch.equal(sd.generate("a <r> cat", seed=0, customization=engine.ICO([learned]), **_OPTIONS).latents, same)


def test_several_concepts_add_up_in_any_order(both) -> None:
    sd, concept, _ = both
    other = replace(_concept(sd, seed=2), placeholder="W*", noun="teapot")
    prompt = "a V* cat beside a W* teapot"
    one, two = (
        sd.generate(prompt, seed=0, customization=engine.ICO(order), **_OPTIONS).latents
        for order in ([concept, other], [other, concept])
    )
    assert relative_error(one, two) <= 1e-5
    context = Texts(sd.text_encoder).encode([Text(parse_weights(prompt), (concept, other))], "a1111")
    name = next(iter(sd.unet.cross_attentions))
    weight = sd.unet.cross_attentions[name].to_k.weight
    weight = weight + concept.changes[f"{name}.to_k"].up + other.changes[f"{name}.to_k"].up
    (keys, _), *_ = _text_kv(sd, Text(parse_weights(prompt), (concept, other)))
    torch.testing.assert_close(keys, context @ weight.T)


def test_threads_keep_their_own_tokens(both) -> None:
    sd, _, _ = both
    concepts = [_concept(sd, seed) for seed in range(4)]
    alone = [_text_kv(sd, Text(parse_weights("a V* cat"), (concept,))) for concept in concepts]
    found: dict[int, list] = {i: [] for i in range(4)}

    def encode(i: int) -> None:
        for _ in range(10):
            found[i].append(_text_kv(sd, Text(parse_weights("a V* cat"), (concepts[i],))))

    threads = [threading.Thread(target=encode, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, expected in enumerate(alone):
        assert len(found[i]) == 10
        for text_kv in found[i]:
            torch.testing.assert_close(text_kv[0][0], expected[0][0])


def test_low_rank_changes(both, tmp_path: Path) -> None:
    sd, concept, _ = both
    whole = sd.generate(_PROMPT, seed=3, customization=engine.ICO([concept]), **_OPTIONS).latents
    errors, sizes = [], []
    for rank in (4, 16, 32):
        concept.save(tmp_path / "c.safetensors", rank=rank)
        again = Concept.load(tmp_path / "c.safetensors")
        errors.append(again.training["compression_error"])
        sizes.append((tmp_path / "c.safetensors").stat().st_size)
        drawn = sd.generate(_PROMPT, seed=3, customization=engine.ICO([again]), **_OPTIONS).latents
    assert errors[0] > errors[1] > errors[2]
    assert sizes[0] < sizes[1] < sizes[2]
    matrix = next(iter(concept.changes.values())).matrix()
    assert Change(matrix).compressed(min(matrix.shape))[1] <= 1e-6
    assert errors[2] < 1e-4  # the narrower side of every matrix
    assert relative_error(drawn, whole) <= 2e-3  # of rounding to float16


def test_textual_inversion_of_diffusers(tmp_path: Path) -> None:
    pipeline = save_pipeline("narrow", tmp_path / "model")
    vectors = torch.randn(2, pipeline.text_encoder.config.hidden_size)
    save_file({"<cat-toy>": vectors}, tmp_path / "learned.safetensors")
    save_file({"emb_params": vectors[0]}, tmp_path / "a1111.safetensors")
    sd = engine.load(tmp_path / "model")
    concept = engine.import_textual_inversion(tmp_path / "learned.safetensors")
    drawn = sd.generate("a <cat-toy> in snow", seed=3, customization=engine.ICO([concept]), **_OPTIONS).latents
    pipeline.load_textual_inversion(tmp_path / "learned.safetensors")
    assert relative_error(drawn, _theirs(pipeline, "a <cat-toy> in snow")) <= 5e-5
    other = engine.import_textual_inversion(tmp_path / "a1111.safetensors", noun="cat")
    assert (other.placeholder, other.noun, tuple(other.tokens.shape)) == ("a1111", "cat", (1, vectors.shape[1]))


def test_custom_diffusion_of_diffusers(tmp_path: Path) -> None:
    pipeline = save_pipeline("narrow", tmp_path / "model", seed=5)
    sd = engine.load(tmp_path / "model")
    torch.manual_seed(1)
    processors = {
        name: CustomDiffusionAttnProcessor(train_kv=False, train_q_out=False) for name in pipeline.unet.attn_processors
    }
    for name in processors:
        if name.endswith("attn2.processor"):
            attn2 = pipeline.unet.get_submodule(name.removesuffix(".processor"))
            tuned = CustomDiffusionAttnProcessor(
                train_kv=True, train_q_out=False, hidden_size=attn2.to_k.out_features, cross_attention_dim=32
            )
            for projection in ("to_k", "to_v"):
                weight = getattr(attn2, projection).weight
                getattr(tuned, f"{projection}_custom_diffusion").weight.data = weight + 0.1 * torch.randn_like(weight)
            processors[name] = tuned
    pipeline.unet.set_attn_processor(processors)
    pipeline.unet.save_attn_procs(tmp_path, safe_serialization=True)
    concept = engine.import_custom_diffusion(sd, tmp_path / "pytorch_custom_diffusion_weights.safetensors", "cat")
    assert len(concept.changes) == 2 * len(sd.unet.cross_attentions)
    drawn = sd.generate("a cat", seed=3, customization=engine.ICO([concept]), **_OPTIONS).latents
    assert relative_error(drawn, _theirs(pipeline, "a cat")) <= 5e-5
    concept.save(tmp_path / "saved.safetensors")
    again = sd.generate(
        "a cat", seed=3, customization=engine.ICO([Concept.load(tmp_path / "saved.safetensors")]), **_OPTIONS
    )
    assert relative_error(again.latents, drawn) <= 2e-3


def test_files_of_others_that_cannot_be_used(small: engine.Engine, tmp_path: Path) -> None:
    layer = next(iter(small.unet.cross_attentions))
    own = small.unet.cross_attentions[layer].to_k.weight
    cases = {
        "pickle.bin": (b"x", "pickle files can run code"),
        "html.safetensors": (b"<html>", "not a safetensors file"),
        "two.safetensors": ({"a": torch.zeros(2), "b": torch.zeros(2)}, "must be one tensor"),
        "nan.safetensors": ({"a": torch.full((32,), float("nan"))}, "must be finite"),
        "space.safetensors": ({"my cat": torch.zeros(32)}, "placeholder must be a text without spaces"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else save_file(content, path)
        with pytest.raises(engine.ConceptFileError, match=message) as caught:
            engine.import_textual_inversion(path)
        assert str(path) in str(caught.value)
    key = f"{layer}.processor.to_k_custom_diffusion.weight"
    for content, message in (
        ({f"{layer}.processor.to_q_custom_diffusion.weight": own.clone()}, "only keys and values"),
        ({key.replace("blocks.0", "blocks.9"): own.clone()}, "no cross-attention layer"),
        ({key: torch.zeros(3, 3)}, "found \\(3, 3\\)"),
        ({}, "found no tensor"),
    ):
        save_file(content, tmp_path / "x.safetensors")
        with pytest.raises(engine.ConceptFileError, match=message):
            engine.import_custom_diffusion(small, tmp_path / "x.safetensors", "cat")
    with pytest.raises(engine.ConceptFileError, match="no such file"):
        engine.import_textual_inversion(tmp_path / "none.safetensors")


def test_what_does_not_fit_is_refused(small: engine.Engine) -> None:
    concept = _concept(small)
    name = next(iter(concept.changes))
    residual = Concept("cat", {"a": torch.zeros(2)})

    def draw(prompt: str, custom) -> None:
        small.generate(prompt, seed=0, customization=custom, long_prompts="truncate", **_OPTIONS)

    for prompt, make, message in (
        ("a cat", lambda: engine.ICO([concept]), r"must contain 'V\*'"),
        ("a cat", lambda: engine.DCI(concept), r"must contain 'V\* cat'"),
        ("cat " * 76 + "V*", lambda: engine.ICO([concept]), "was cut off"),
        ("a V* fluffy cat", lambda: engine.DCI(concept), "'cat' right behind the placeholder"),
        ("V* and V*", lambda: engine.DCI(concept), "2 times"),
        ("a V* cat", lambda: engine.ICO([concept, concept]), "placeholders of their own"),
        ("a V* cat", lambda: engine.ICO([residual]), "use engine.Infusion"),
        ("a V* cat", lambda: engine.DCI(residual), "use engine.Infusion"),
        ("a V* cat", lambda: engine.Infusion([concept]), "use engine.ICO"),
        ("a V* cat", lambda: engine.ICO([]), "at least one engine.Concept"),
        ("a V* cat", lambda: engine.DCI(5), "at least one engine.Concept"),
        ("a V* cat", lambda: engine.DCI(Concept("", tokens=concept.tokens)), "auxiliary_noun must be given"),
        ("a V* cat", lambda: engine.ICO([replace(concept, tokens=torch.zeros(2, 5))]), "must be 32 wide"),
        ("a V* cat", lambda: engine.ICO([replace(concept, changes={"x.to_k": Change(torch.zeros(2, 2))})]), "no cross"),
        (
            "a V* cat",
            lambda: engine.ICO([replace(concept, changes={name: Change(torch.zeros(2, 2))})]),
            "this model's is",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            draw(prompt, make())
    with pytest.warns(UserWarning, match="was trained on another model"):
        draw("a V* cat", engine.ICO([replace(concept, base=tuple(-x for x in small.fingerprint))]))
    draw("V* alone", engine.DCI(replace(concept, noun=""), "dog"))


def test_concepts_with_tokens_are_checked(tmp_path: Path) -> None:
    tokens = torch.zeros(2, 4)
    for arguments, message in (
        ({"residuals": {"a": torch.zeros(2)}, "tokens": tokens}, "got both"),
        ({"tokens": torch.zeros(4)}, "tokens must be floating-point matrices"),
        ({"tokens": tokens, "placeholder": "V x"}, "placeholder must be a text without spaces"),
        ({"tokens": tokens, "changes": {"a.to_k": Change(torch.zeros(2, 3), torch.zeros(2, 4))}}, r"\(C, r\)"),
        ({"tokens": tokens, "changes": {"a.to_k": Change(tokens / 0)}}, "must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            Concept("cat", **arguments)
    with pytest.raises(ValueError, match="dtype must be float16"):
        Concept("cat", tokens=tokens).save(tmp_path / "x", "int8")
    with pytest.raises(ValueError, match="has none of"):
        Concept("cat", tokens=tokens).save(tmp_path / "x", rank=2)
    with pytest.raises(ValueError, match="must fit float16"):
        Concept("cat", tokens=tokens + 1e6).save(tmp_path / "x")
    metadata = {
        "format": "twinstream-concept",
        "version": "1",
        "method": "ico",
        "noun": "cat",
        "placeholder": "V*",
        "base": "[]",
        "training": "{}",
    }
    half = tokens.half()
    for tensors, message in (
        ({"tokens": tokens}, "must be a float16 matrix"),
        ({"a.to_q": half}, "found 'a.to_q'"),
        ({"a.to_k.up": half}, "found 'a.to_k'"),
        ({"a.to_k": half, "a.to_k.up": half.clone()}, "found 'a.to_k'"),
        ({}, "residuals must map"),
        ({f"{i}.to_k": half.clone() for i in range(1026)}, "at most 1025 tensors"),
    ):
        save_file(tensors, tmp_path / "c.safetensors", metadata)
        with pytest.raises(engine.ConceptFileError, match=message):
            Concept.load(tmp_path / "c.safetensors")
