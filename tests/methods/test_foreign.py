"""Embeddings by name: what is read of other programs' files, and what of them is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import engine
from engine.loading import model_digest
from engine.methods.foreign import read_embeddings, read_vectors
from tests.loras import write_kohya
from tests.pipelines import relative_error


@pytest.mark.parametrize(
    ("tensors", "token"),
    [
        ({"<cat-toy>": torch.ones(32)}, "<cat-toy>"),
        ({"emb_params": torch.ones(1, 32)}, ""),
        ({"*": torch.ones(1, 32)}, ""),
        ({"string_to_param.*": torch.ones(1, 32), "string_to_token.*": torch.tensor(265)}, ""),
    ],
)
def test_layouts(tensors: dict[str, Any], token: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "toy.safetensors")
    found, vectors = read_vectors(tmp_path / "toy.safetensors")
    assert found == token
    assert torch.equal(vectors, torch.ones(1, 32))
    assert engine.import_textual_inversion(tmp_path / "toy.safetensors").placeholder == (token or "toy")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"emb_params": torch.ones(2, 1024)}, "must be 32 wide for this model's.*found 1024, as of Stable Diffusion 2"),
        ({"emb_params": torch.ones(2, 768)}, "found 768, as of Stable Diffusion 1"),
        ({"emb_params": torch.ones(2, 1280)}, "found 1280, as of SDXL's larger encoder"),
        ({"emb_params": torch.ones(2, 3)}, "found 3, as of another model"),
        ({"clip_g": torch.ones(2, 1280), "clip_l": torch.ones(2, 768)}, "is for SDXL, whose two text encoders"),
        ({"a": torch.ones(32), "b": torch.ones(32)}, r"must be one tensor, found \['a', 'b'\]"),
        ({"a": torch.ones(1, 2, 32)}, r"must be finite numbers \(S, E\), found \(1, 2, 32\)"),
        ({"a": torch.ones(2, 32, dtype=torch.int64)}, "must be finite numbers"),
        ({"a": torch.full((32,), torch.inf)}, "must be finite numbers"),
    ],
)
def test_files_that_do_not_fit(small_folder: Path, tensors: Any, message: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "toy.safetensors")
    with pytest.raises(engine.ConceptFileError, match=message) as caught:
        engine.load(small_folder, embeddings={"<toy>": tmp_path / "toy.safetensors"})
    assert "toy.safetensors" in str(caught.value)


def test_names(tmp_path: Path) -> None:
    file = tmp_path / "toy.safetensors"
    save_file({"a": torch.ones(32)}, file)
    assert list(read_embeddings({"<Toy>": file, "bad-hands-5": str(file)}, 32)) == ["<toy>", "bad-hands-5"]
    for name in ("", "my toy", "toy:1", "(toy)", "[toy]", "a|b", "a\\b", 3):
        with pytest.raises(ValueError, match="names of embeddings must be texts without spaces and"):
            read_embeddings({name: file}, 32)
    with pytest.raises(ValueError, match="must have names that differ in more than case, got 'TOY' twice"):
        read_embeddings({"toy": file, "TOY": file}, 32)
    with pytest.raises(ValueError, match="embeddings must map names to files, got"):
        read_embeddings(["toy"], 32)  # pyright: ignore[reportArgumentType]
    (tmp_path / "toy.pt").write_bytes(b"x")
    with pytest.raises(engine.ConceptFileError, match="pickle files can run code"):
        read_embeddings({"toy": tmp_path / "toy.pt"}, 32)


@pytest.fixture
def named(small_folder: Path, tmp_path: Path) -> engine.Engine:
    torch.manual_seed(0)
    files = {}
    for name, count in (("toy", 2), ("toy-red", 1), ("<v>", 3)):
        files[name] = tmp_path / f"{len(files)}.safetensors"
        save_file({"emb_params": torch.randn(count, 32)}, files[name])
    return engine.load(small_folder, embeddings=files)


def test_words_of_prompts(named: engine.Engine, small: engine.Engine) -> None:
    text = named.text_encoder
    for prompt, learned in (
        ("a toy", {2: "toy", 3: "toy"}),
        ("a TOY-red toy", {2: "toy-red", 3: "toy", 4: "toy"}),
        ("toys and a mytoy", {}),
        ("a (<v>:1.2), red", {2: "<v>", 3: "<v>", 4: "<v>"}),
    ):
        tokens = text.tokenize(prompt)
        assert [at for at, _ in tokens.learned] == list(learned)
        for at, vector in tokens.learned:
            assert any(torch.equal(vector, one) for one in text.embeddings[learned[at]])
    assert [weight for weight in tokens.weights if weight != 1.0] == [1.2] * 3
    assert not torch.equal(named.encode_prompt("a toy"), small.encode_prompt("a toy"))
    assert torch.equal(named.encode_prompt("a cat"), small.encode_prompt("a cat"))


def test_words_of_later_chunks(named: engine.Engine) -> None:
    """Of several prompts: each vector goes to its own chunk."""
    context = named.encode_prompt(["a cat BREAK red", "a boat BREAK a toy-red toy"])
    for i, text in enumerate(("a cat", "red", "a boat", "a toy-red toy")):
        torch.testing.assert_close(context[i // 2, 77 * (i % 2) :][:77], named.encode_prompt(text)[0])


def test_settings_name_those_that_are_used(named: engine.Engine) -> None:
    def used(prompt: Any, **options: Any) -> list[str]:
        return named.generate(prompt, steps=2, progress=False, output="latent", **options).settings["embeddings"]

    assert used("a cat") == []
    assert used("a toy-red cat", negative_prompt="Toy") == ["toy", "toy-red"]
    assert used(["a cat", "a [cat:(<v>:1.2):1]"]) == ["<v>"]
    out = named.generate(["a cat", "a [cat:(<v>:1.2):1]"], steps=2, progress=False, negative_prompt=["Toy", ""])
    kept = [json.loads(out.png_info(i).chunks[1][1].split(b"\0")[-1]) for i in range(2)]
    assert [one["embeddings"] for one in kept] == [["toy"], ["<v>"]], "a picture's own"


def test_another_engine_keeps_them(named: engine.Engine, tmp_path: Path) -> None:
    write_kohya(named, tmp_path / "lace.safetensors")
    lace = named.with_loras([engine.LoRA(tmp_path / "lace.safetensors")])
    assert lace.text_encoder is not named.text_encoder
    assert lace.text_encoder.embeddings == named.text_encoder.embeddings
    assert len(lace.text_encoder.tokenize("a toy").learned) == 2


def test_an_embedding_beside_a_concept(named: engine.Engine) -> None:
    """Both in one prompt; a placeholder that is an embedding's name could mean either."""
    concept = engine.Concept("cat", tokens=torch.randn(1, 32), placeholder="V*")
    options = {"steps": 1, "seed": 0, "output": "latent", "progress": False}
    both = named.generate("a V* cat and a toy", customization=engine.ICO([concept]), **options)
    spelled = named.generate("a V* cat and a boat", customization=engine.ICO([concept]), **options)
    assert relative_error(both.latents, spelled.latents) > 0
    clash = engine.Concept("cat", tokens=torch.randn(1, 32), placeholder="Toy")
    with pytest.raises(ValueError, match="a placeholder must not be the name of an embedding too, got 'toy'"):
        named.generate("a Toy cat", customization=engine.ICO([clash]), **options)


def test_they_decide_pictures(small_folder: Path, tmp_path: Path) -> None:
    digests = set()
    for value in (0.0, 1.0):
        save_file({"a": torch.full((32,), value)}, tmp_path / "toy.safetensors")
        for name in ("toy", "boat"):
            digests.add(model_digest({"model": small_folder, "embeddings": {name: tmp_path / "toy.safetensors"}}))
    assert len(digests | {model_digest({"model": small_folder})}) == 5
