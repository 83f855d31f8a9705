"""LoRAs make another Engine: what it shares with its base, and how results, command line and concepts see it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import engine
from engine.backends.graphs import Graphs
from engine.backends.packed_weights import PackedConv2d
from engine.cli import main
from engine.methods.lora import read_changes
from engine.models.transformer import Transformer2DModel
from engine.models.unet import UNet2DConditionModel
from tests.loras import write_kohya
from tests.pipelines import random_concept, relative_error

_FAST = {"steps": 3, "seed": 0, "progress": False}


@pytest.fixture
def style(small: engine.Engine, tmp_path: Path) -> Path:
    """A LoRA of one self-attention, one 3x3 and one 1x1 convolution, and of the text encoder's queries."""
    chosen = ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.", "mid_block.resnets.1.conv2.", "1.proj_in.")
    return write_kohya(
        small,
        tmp_path / "style.safetensors",
        lambda name: any(one in name for one in chosen),
        lambda name: "q_proj" in name,
    )


def _kv_only(sd: engine.Engine, path: Path) -> Path:
    return write_kohya(sd, path, lambda name: "attn2.to_k" in name or "attn2.to_v" in name, None)


def test_the_base_stays_what_it_was_to_the_bit(small: engine.Engine, style: Path) -> None:
    before = {name: weight.clone() for name, weight in small.unet.state_dict().items()}
    expected = small.generate("a cat", **_FAST).latents
    styled = small.with_loras([engine.LoRA(style)])
    assert relative_error(styled.generate("a cat", **_FAST).latents, expected) > 0.02
    assert torch.equal(small.generate("a cat", **_FAST).latents, expected)
    assert all(torch.equal(weight, before[name]) for name, weight in small.unet.state_dict().items())


def test_what_no_lora_touches_is_shared(small: engine.Engine, style: Path) -> None:
    styled = small.with_loras([engine.LoRA(style)])
    assert styled.vae is small.vae
    differ = _differing(small.unet, styled.unet)
    assert differ == {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_qkv.weight",
        "mid_block.resnets.1.conv2.weight",
        "up_blocks.1.attentions.1.proj_in.weight",
    }
    assert styled.unet.down_blocks[1] is small.unet.down_blocks[1]
    text = _differing(small.text_encoder.model, styled.text_encoder.model)
    assert text == {f"encoder.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}
    assert styled.text_encoder.tokenizer is small.text_encoder.tokenizer
    assert styled.text_encoder._lock is small.text_encoder._lock  # two threads may not use one tokenizer at once


def _differing(one: torch.nn.Module, other: torch.nn.Module) -> set[str]:
    """Parameters that are not the very same objects."""
    mine = dict(one.named_parameters())
    return {name for name, parameter in other.named_parameters() if parameter is not mine[name]}


def test_packed_weights_are_shared_too(style: Path) -> None:
    sd, name = engine.load(backend="native"), "down_blocks.0.downsamplers.0.conv"
    expected = sd.generate("a cat", **_FAST).latents
    chosen = write_kohya(sd, style.parent / "one.safetensors", lambda one: one.startswith(f"{name}."), None)
    styled = sd.with_loras([engine.LoRA(chosen)])
    convs = [one for one, module in sd.unet.named_modules() if isinstance(module, PackedConv2d)]
    shared = [one for one in convs if sd.unet.get_submodule(one) is styled.unet.get_submodule(one)]
    assert set(convs) - set(shared) == {name}
    assert any(len(_packed_conv(sd, one).convolution._packed) for one in shared)
    assert not len(_packed_conv(styled, name).convolution._packed)
    assert styled.backend is sd.backend  # it keeps what is packed by weight
    assert not torch.equal(styled.generate("a cat", **_FAST).latents, expected)
    assert torch.equal(sd.generate("a cat", **_FAST).latents, expected)


def _packed_conv(sd: engine.Engine, name: str) -> PackedConv2d:
    module = sd.unet.get_submodule(name)
    assert isinstance(module, PackedConv2d)
    return module


def test_at_load_and_later_are_one(small: engine.Engine, small_folder: Path, style: Path) -> None:
    loras = [engine.LoRA(style, 0.5)]
    loaded, later = engine.load(small_folder, loras=loras), small.with_loras(loras)
    for name, weight in loaded.unet.state_dict().items():
        assert torch.equal(weight, later.unet.state_dict()[name]), name
    assert torch.equal(loaded.generate("a cat", **_FAST).latents, later.generate("a cat", **_FAST).latents)
    assert loaded.loras == later.loras == tuple(loras)


def test_merging_happens_before_rounding(small_folder: Path, small: engine.Engine, style: Path) -> None:
    lora = engine.LoRA(style, 0.5)
    rounded = engine.load(small_folder, dtype="bfloat16", loras=[lora]).unet.state_dict()
    for name, weight in small.with_loras([lora]).unet.state_dict().items():
        assert torch.equal(rounded[name], weight.bfloat16()), name


def test_rounded_weights_are_merged_in_float32_too(small_folder: Path, style: Path) -> None:
    sd, lora = engine.load(small_folder, dtype="bfloat16"), engine.LoRA(style, 0.5)
    after, changes = sd.with_loras([lora]), read_changes([lora], sd.unet.config, sd.unet, sd.text_encoder.model)[0]
    for name, weight in sd.unet.state_dict().items():
        assert torch.equal(after.unet.state_dict()[name], changes(name, weight.float()).bfloat16()), name


def test_loras_on_loras(small: engine.Engine, style: Path) -> None:
    twice = small.with_loras([engine.LoRA(style, 0.5)]).with_loras([engine.LoRA(style, 0.25)])
    once = small.with_loras([engine.LoRA(style, 0.75)])
    assert [lora.weight for lora in twice.loras] == [0.5, 0.25]
    assert relative_error(twice.generate("a cat", **_FAST).latents, once.generate("a cat", **_FAST).latents) <= 1e-5


def test_unet_and_text_encoder_apart(small: engine.Engine, style: Path) -> None:
    text_only = small.with_loras([engine.LoRA(style, 0.0, text_weight=0.8)])
    assert text_only.unet is small.unet
    both = small.with_loras([engine.LoRA(style, 0.8)])
    assert torch.equal(text_only.encode_prompt("a cat"), both.encode_prompt("a cat"))
    unet_only = small.with_loras([engine.LoRA(style, 0.8, text_weight=0.0)])
    assert unet_only.text_encoder is small.text_encoder
    assert not _differing(both.unet, both.unet)
    for name, weight in unet_only.unet.state_dict().items():
        assert torch.equal(weight, both.unet.state_dict()[name])


def test_results_name_them(small: engine.Engine, style: Path, tmp_path: Path) -> None:
    styled = small.with_loras([engine.LoRA(style, 0.5), engine.LoRA(style, -1.0, text_weight=0.0)])
    out = styled.generate("a cat", **_FAST)
    assert out.settings["loras"] == [
        {"name": "style", "weight": 0.5, "text_weight": 0.5},
        {"name": "style", "weight": -1.0, "text_weight": 0.0},
    ]
    (path,) = out.save(tmp_path / "out")
    assert 'LoRA: "style:0.5, style:-1"' in Image.open(path).text["parameters"]
    plain = small.generate("a cat", **_FAST)
    assert plain.settings["loras"] == []
    assert "LoRA" not in plain.parameters(0)


def test_a_file_of_a_common_name_is_named_by_its_folder(small: engine.Engine, tmp_path: Path) -> None:
    (tmp_path / "lace").mkdir()
    write_kohya(small, tmp_path / "lace" / "pytorch_lora_weights.safetensors", text=None)
    assert engine.LoRA(tmp_path / "lace").settings()["name"] == "lace"


def test_learned_words_go_to_their_own_encoder(small: engine.Engine, style: Path) -> None:
    """Both encoders share the token embeddings, and each puts the vectors of its own requests among them."""
    styled = small.with_loras([engine.LoRA(style)])
    concept = engine.Concept("", tokens=torch.randn(2, 32), placeholder="V*")
    for sd in (small, styled):
        plain = sd.generate("a V* cat", **_FAST).latents
        custom = sd.generate("a V* cat", customization=engine.ICO([concept]), **_FAST).latents
        assert relative_error(custom, plain) > 1e-3
    embedding = small.text_encoder.model.get_input_embeddings()
    assert len(embedding._forward_hooks) == 1
    assert embedding.weight is styled.text_encoder.model.get_input_embeddings().weight


def test_fingerprints_differ_where_values_do(small: engine.Engine, style: Path, tmp_path: Path) -> None:
    concept = replace(random_concept(small), base=small.fingerprint)
    styled = small.with_loras([engine.LoRA(style)])
    assert styled.fingerprint == small.fingerprint
    styled.generate("a cat", customization=engine.Infusion([concept]), **_FAST)
    strong = small.with_loras([engine.LoRA(_kv_only(small, tmp_path / "kv.safetensors"), 3.0)])
    assert strong.fingerprint != small.fingerprint
    with pytest.warns(UserWarning, match="was trained on another model"):
        strong.generate("a cat", customization=engine.Infusion([concept]), **_FAST)


def test_a_lora_of_keys_and_values_is_a_concept(small: engine.Engine, style: Path, tmp_path: Path) -> None:
    lora = engine.LoRA(_kv_only(small, tmp_path / "kv.safetensors"), 0.7)
    concept = engine.import_lora(small, lora, "cat")
    assert (concept.name, concept.noun, concept.base) == ("kv", "cat", small.fingerprint)
    options = {"negative_prompt": "blurry", **_FAST}
    expected = small.with_loras([lora]).generate("a cat", **options).latents
    assert (
        relative_error(small.generate("a cat", customization=engine.ICO([concept]), **options).latents, expected)
        <= 1e-5
    )
    assert relative_error(small.generate("a cat", **options).latents, expected) > 0.02
    for path in (style, write_kohya(small, tmp_path / "text.safetensors", None)):
        with pytest.raises(
            engine.ConceptFileError, match=r"only keys and values .* use with_loras; found (.*to_q|enc)"
        ):
            engine.import_lora(small, engine.LoRA(path), "cat")


def test_composed_products_are_made_anew(small: engine.Engine) -> None:
    """As with the Triton backend, which keeps products of weights."""
    own = UNet2DConditionModel(small.unet.config).eval().requires_grad_(False)
    own.load_state_dict(small.unet.state_dict())
    own.compose()
    changed = {
        name: 2 * weight for name, weight in own.state_dict().items() if "up_blocks.1.attentions.1.proj_out" in name
    }
    other = own.with_weights(changed)
    blocks = [module for module in other.modules() if isinstance(module, Transformer2DModel)]
    fresh = UNet2DConditionModel(small.unet.config).eval().requires_grad_(False)
    fresh.load_state_dict(own.state_dict() | changed)
    fresh.compose()
    for ours, theirs in zip(blocks, (m for m in fresh.modules() if isinstance(m, Transformer2DModel)), strict=True):
        for a, b in zip(ours._composed, theirs._composed, strict=True):
            assert torch.equal(a, b)


def test_graphs_are_its_own(small: engine.Engine, style: Path) -> None:
    captured = Graphs(lambda: lambda function: (lambda: None, function()))
    sd = engine.Engine(
        small.name, small.unet, small.vae, small.text_encoder, small.schedule, small.backend, captured, max_pixels=999
    )
    styled = sd.with_loras([engine.LoRA(style)])
    assert styled.graphs is not captured
    assert styled.graphs.make_capture is captured.make_capture
    assert styled.limits.max_pixels == 999
    assert small.with_loras([engine.LoRA(style)]).graphs is None


def test_command_line(small_folder: Path, style: Path, tmp_path: Path, capsys) -> None:
    draw = ["generate", "a cat", "--model", str(small_folder), "--steps", "3", "--seed", "0", "--quiet"]
    assert main([*draw, "--lora", str(style), "--lora", f"{style}:-0.5", "--out", str(tmp_path / "out")]) == 0
    (path,) = (tmp_path / "out").iterdir()
    assert 'LoRA: "style:1, style:-0.5"' in Image.open(path).text["parameters"]
    capsys.readouterr()
    for given, message in (
        (f"{style}:much", "lora must be FILE or FILE:WEIGHT with a number, got"),
        (f"{style}:1000", "weight must be a finite number from -100 to 100, got 1000.0"),
        ("nowhere.safetensors", "nowhere.safetensors: a LoRA must be a .safetensors file"),
    ):
        assert main([*draw, "--lora", given]) == 1
        assert message in capsys.readouterr().err


def test_refusals(small: engine.Engine, style: Path) -> None:
    for lora in ("style.safetensors", [style]):
        with pytest.raises(ValueError, match=r"loras must be a list of engine.LoRA, got"):
            small.with_loras(lora)
    with pytest.raises(ValueError, match="text_weight must be a finite number from -100 to 100, got nan"):
        engine.LoRA(style, text_weight=float("nan"))
    with pytest.raises(
        engine.CheckpointError, match=r"a LoRA must be a .safetensors file, or a folder with pytorch_lora"
    ):
        engine.LoRA(style.parent)
