"""Concept files: what is written is what is read, and what is not a concept is refused by name."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

import engine
from engine.errors import ConceptFileError
from engine.files import write_atomically
from engine.methods.concept import Change, Concept
from tests.pipelines import random_concept

_LAYERS = {
    "down_blocks.0.attentions.1.transformer_blocks.0.attn2": 6,
    "mid_block.attentions.0.transformer_blocks.0.attn2": 8,
    "odd": 3,
}


@pytest.fixture
def concept() -> Concept:
    torch.manual_seed(0)
    residuals = {name: torch.randn(width) for name, width in _LAYERS.items()}
    return Concept("cat", residuals, "value", (0.5, -1.25, 2.0), {"steps": 500, "model": "ein Modell, größer"})


@pytest.fixture
def file(concept: Concept, tmp_path: Path) -> Path:
    concept.save(tmp_path / "cat.safetensors")
    return tmp_path / "cat.safetensors"


def _metadata(**changes: str) -> dict[str, str]:
    metadata = {
        "format": "twinstream-concept",
        "version": "1",
        "method": "infusion",
        "noun": "cat",
        "space": "text",
        "layers": json.dumps({"a": 2, "b": 3}),
        "base": "[]",
        "training": "{}",
    }
    return metadata | changes


def _write(path: Path, tensors: dict | None = None, **changes: str) -> Path:
    save_file({"residuals": torch.zeros(5).half()} if tensors is None else tensors, path, _metadata(**changes))
    return path


@pytest.mark.parametrize(("dtype", "error"), [("float16", 1e-3), ("int8", 1e-2)])
def test_round_trip(concept: Concept, tmp_path: Path, dtype: str, error: float) -> None:
    path = tmp_path / "violet.safetensors"
    concept.save(path, dtype)
    again = Concept.load(path)
    assert (again.noun, again.space, again.base, again.name) == ("cat", "value", concept.base, "violet")
    assert again.training == concept.training
    assert list(again.residuals) == list(concept.residuals)
    for name, residual in concept.residuals.items():
        assert (again.residuals[name] - residual).abs().max() <= error * residual.abs().max()


def test_sizes_at_full_scale(tmp_path: Path) -> None:
    layers = [f"down_blocks.{i}.attentions.{j}.transformer_blocks.0.attn2" for i in range(8) for j in range(2)]
    training = {"steps": 500, "model": "stable-diffusion-v1-5", "learning_rate": 0.01, "batch_size": 4, "seed": 0}
    concept = Concept("backpack", {name: torch.randn(768) for name in layers}, "text", (-0.1234,) * 16, training)
    sizes = {}
    for dtype in ("float16", "int8"):
        concept.save(tmp_path / dtype, dtype)
        sizes[dtype] = (tmp_path / dtype).stat().st_size
    assert sizes["float16"] <= 26_000
    assert sizes["int8"] <= 13 * 1024


def test_an_all_zero_layer_survives_int8(tmp_path: Path) -> None:
    Concept("cat", {"a": torch.zeros(4), "b": torch.ones(2)}).save(tmp_path / "x", "int8")
    again = Concept.load(tmp_path / "x")
    assert not again.residuals["a"].any()
    torch.testing.assert_close(again.residuals["b"], torch.ones(2))


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "cat.safetensors"
    for content, message in (
        (b"", "found an empty one"),
        (pickle.dumps({"a": 1}), "a pickle file"),
        (b"PK\x03\x04" + bytes(100), "a zip or pickle file"),
        (b"<!DOCTYPE html><html>not found</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 24000\n", "a git-lfs pointer"),
        (save({"x": torch.zeros(300_000)}, _metadata()), "at most 1000000 bytes; this one has 1200"),
        (b"\x01", "not a whole safetensors file"),
        ((5).to_bytes(8, "little") + b"{oops", "cat.safetensors: "),
        (save({"residuals": torch.zeros(5)}), "not a concept"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConceptFileError, match=message) as caught:
            Concept.load(path)
        assert str(path) in str(caught.value)
    with pytest.raises(ConceptFileError, match="found a folder"):
        Concept.load(tmp_path)
    with pytest.raises(ConceptFileError, match="No such file"):
        Concept.load(tmp_path / "none")


@pytest.mark.parametrize("lost", [1, 10, 200])
def test_truncated(file: Path, lost: int) -> None:
    file.write_bytes(file.read_bytes()[:-lost])
    with pytest.raises(ConceptFileError):
        Concept.load(file)


def test_contents_that_do_not_agree(tmp_path: Path) -> None:
    zeros = torch.zeros(5).half()
    for tensors, changes, message in (
        ({"residuals": torch.zeros(6).half()}, {}, r"must be float16 or int8 of shape \(5,\)"),
        ({"residuals": zeros.float()}, {}, "found torch.float32"),
        ({"other": zeros}, {}, r"must hold the tensors \['residuals'\], found \['other'\]"),
        ({"residuals": zeros, "more": zeros.clone()}, {}, "found \\['more', 'residuals'\\]"),
        ({"residuals": zeros.to(torch.int8)}, {}, "must hold the tensors \\['residuals', 'scales'\\]"),
        ({"residuals": zeros.to(torch.int8), "scales": torch.ones(3)}, {}, r"scales must be float32 of shape \(2,\)"),
        ({"residuals": zeros.to(torch.int8), "scales": torch.tensor([1.0, float("nan")])}, {}, "must be finite"),
        ({"residuals": zeros / 0}, {}, "must be finite"),
        (None, {"layers": "[]"}, "layers must be a JSON dict"),
        (None, {"layers": "{}"}, "layers must give 1 to 256 layers"),
        (None, {"layers": '{"a":-5}'}, "layers must give"),
        (None, {"layers": '{"a":true,"b":4}'}, "layers must give"),
        (None, {"layers": "{"}, "line 1"),
        (None, {"base": '["x"]'}, "base must be a list of numbers"),
        (None, {"space": "keys"}, "space must be one of text, value"),
        (None, {"noun": " "}, "noun must be"),
        (None, {"method": "lora"}, "method must be one of infusion, ico, found 'lora'"),
        (None, {"version": "2"}, "version must be 1, found '2'"),
    ):
        with pytest.raises(ConceptFileError, match=message):
            Concept.load(_write(tmp_path / "x.safetensors", tensors, **changes))
    metadata = _metadata()
    del metadata["base"]
    save_file({"residuals": zeros}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(ConceptFileError, match="missing base"):
        Concept.load(tmp_path / "x.safetensors")


def test_bad_concepts_are_refused() -> None:
    for arguments, message in (
        ({"noun": ""}, "noun must be"),
        ({"space": "latent"}, "space must be one of"),
        ({"residuals": {}}, "residuals must map"),
        ({"residuals": {"a": torch.zeros(2, 2)}}, r"must be floating-point vectors, got \(2, 2\) for 'a'"),
        ({"residuals": {"a": [1.0]}}, "got list for 'a'"),
        ({"residuals": {"a": torch.zeros(0)}}, r"got \(0,\) for 'a'"),
        ({"residuals": {"a": torch.tensor([float("inf")])}}, "must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.Concept(**({"noun": "cat", "residuals": {"a": torch.zeros(2)}} | arguments))
    with pytest.raises(ValueError, match="must fit float16"):
        engine.Concept("cat", {"a": torch.tensor([1e6])}).save("never-written")
    assert not Path("never-written").exists()


def test_a_failed_write_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def fail(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(file, b"new")
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_a_concept_of_another_base_warns(small: engine.Engine) -> None:
    widths = {name: attn2.to_v.in_features for name, attn2 in small.unet.cross_attentions.items()}
    residuals = {name: torch.zeros(width) for name, width in widths.items()}
    options = {"steps": 1, "seed": 0, "output": "latent", "progress": False}
    own = Concept("cat", residuals, base=small.fingerprint)
    small.generate("a cat", customization=engine.Infusion([own]), **options)
    other = Concept("cat", residuals, base=tuple(-value for value in small.fingerprint))
    with pytest.warns(UserWarning, match="'cat' was trained on another model"):
        small.generate("a cat", customization=engine.Infusion([other]), **options)
    with pytest.raises(ConceptFileError, match="base must have"):
        small.generate("a cat", customization=engine.Infusion([Concept("cat", residuals, base=(1.0,))]), **options)


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    concept = engine.Concept("cat", {"mid_block.attn2": torch.ones(4)}, training={"note": "x" * 120_000})
    with pytest.raises(ValueError, match=r"must fit a header of 100000 bytes, got 12.* of them training"):
        concept.save(tmp_path / "cat.safetensors")
    assert not list(tmp_path.iterdir())
    large = engine.Concept("cat", {"mid_block.attn2": torch.ones(600_000)})
    with pytest.raises(ValueError, match="a concept file must be at most 1000000 bytes, got 1200"):
        large.save(tmp_path / "cat.safetensors")
    assert not list(tmp_path.iterdir())


def _draw(sd: engine.Engine, prompt: str, customization: engine.Infusion | engine.ICO) -> torch.Tensor:
    return sd.generate(prompt, customization=customization, seed=0, steps=2, progress=False).latents


@pytest.mark.parametrize("edit", ["in place", "replaced"])
def test_an_edited_concept_is_drawn_as_it_is_now(small: engine.Engine, edit: str) -> None:
    concept = random_concept(small)
    before = _draw(small, "a cat", engine.Infusion([concept]))
    for name, residual in list(concept.residuals.items()):
        if edit == "in place":
            residual.mul_(-1)
        else:
            concept.residuals[name] = -residual
    after = _draw(small, "a cat", engine.Infusion([concept]))
    assert not torch.equal(after, before)
    fresh = engine.Concept("cat", {name: residual.clone() for name, residual in concept.residuals.items()})
    assert torch.equal(after, _draw(small, "a cat", engine.Infusion([fresh])))


def test_edited_tokens_and_changes_are_noticed(small: engine.Engine) -> None:
    attn2 = next(iter(small.unet.cross_attentions))
    width = small.unet.cross_attentions[attn2].to_k.weight.shape
    concept = engine.Concept("cat", tokens=torch.randn(1, 32), changes={f"{attn2}.to_k": Change(torch.randn(width))})
    first = _draw(small, "a V* cat", engine.ICO([concept]))
    concept.changes[f"{attn2}.to_k"].up.zero_()
    second = _draw(small, "a V* cat", engine.ICO([concept]))
    concept.tokens.mul_(-1)
    third = _draw(small, "a V* cat", engine.ICO([concept]))
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_warnings_point_at_the_caller(small: engine.Engine) -> None:
    other = replace(random_concept(small), base=tuple(-value for value in small.fingerprint))
    for arguments, message in (
        ({"prompt": "cat " * 90, "long_prompts": "truncate"}, "longer than the text encoder's 77 tokens"),
        ({"prompt": "a cat", "customization": engine.Infusion([other])}, "trained on another model"),
    ):
        with pytest.warns(UserWarning, match=message) as caught:
            small.generate(arguments.pop("prompt"), steps=1, progress=False, **arguments)
        assert {Path(warning.filename).name for warning in caught} == {Path(__file__).name}
