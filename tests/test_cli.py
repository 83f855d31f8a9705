"""The command line."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from engine.backends.native import levels
from engine.cli import main


def test_generate(small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ["--steps", "2", "--count", "2", "--seed", "3", "--size", "24x16", "--grid", "--quiet", "--out", str(out)]
    assert main(["generate", "a cat", "a dog", "--model", str(small_folder), *options]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "00000-3.png", "00001-4.png", "00002-5.png", "00003-6.png", "grid.png"
    ]  # fmt: skip
    assert Image.open(out / "grid.png").size == (48, 32)
    assert "00003-6.png  a dog" in capsys.readouterr().out


def test_image_to_image(small_folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "start.png")
    options = ["--image", str(tmp_path / "start.png"), "--strength", "0.5", "--steps", "4", "--quiet"]
    assert main(["generate", "a cat", "--model", str(small_folder), *options, "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_inpainting(small_folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 16), "red").save(tmp_path / "start.png")
    mask = Image.new("L", (20, 16))
    mask.paste(255, (8, 4, 14, 12))
    mask.save(tmp_path / "mask.png")
    options = ["--image", str(tmp_path / "start.png"), "--mask", str(tmp_path / "mask.png"), "--mask-padding", "2"]
    options += ["--mask-blur", "0.5", "--strength", "1", "--steps", "4", "--quiet", "--out", str(tmp_path / "out")]
    assert main(["generate", "a cat", "--model", str(small_folder), *options]) == 0
    (path,) = (tmp_path / "out").iterdir()
    drawn = Image.open(path)
    assert drawn.size == (20, 16)
    assert drawn.getpixel((0, 0)) == (255, 0, 0)
    assert drawn.getpixel((10, 8)) != (255, 0, 0)
    assert "Mask blur: 0.5, Inpaint area: Only masked, Masked area padding: 2" in drawn.info["parameters"]


def test_errors_are_one_line(small_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a cat", "--model", str(small_folder), "--steps", "0"]) == 1
    assert capsys.readouterr().err == "twinstream: steps must be an integer >= 1, got 0\n"
    assert main(["generate", "a cat", "--model", "/nowhere"]) == 1
    with pytest.raises(SystemExit):
        main(["generate", "a cat", "--size", "512"])
    assert "size must be WIDTHxHEIGHT" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["generate", "a cat", "--seed", "-1"])
    assert "seed must be integers >= 0" in capsys.readouterr().err


def test_embeddings(small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"emb_params": torch.randn(2, 32)}, tmp_path / "toy.safetensors")
    command = ["generate", "a <toy>", "--model", str(small_folder), "--steps", "1", "--quiet", "--out", str(tmp_path)]
    assert main([*command, "--seed", "1", "--embedding", f"<toy>={tmp_path / 'toy.safetensors'}"]) == 0
    assert '"embeddings": ["<toy>"]' in Image.open(tmp_path / "00000-1.png").text["twinstream"]
    for given, message in (
        (["<toy>"], "embedding must be NAME=FILE, got '<toy>'"),
        (["=a.safetensors"], "embedding must be NAME=FILE, got '=a.safetensors'"),
        (["a=b", "a=c"], "embedding must have a name of its own, got 'a' twice"),
        (["a=none.safetensors"], "none.safetensors: no such file"),
    ):
        assert main([*command, *(word for one in given for word in ("--embedding", one))]) == 1
        assert message in capsys.readouterr().err
    out = str(tmp_path / "merged.safetensors")
    assert main(["convert", "--model", str(small_folder), "--embedding", "a=b", "--out", out]) == 1
    assert "embedding belongs to prompts, which no file of weights has" in capsys.readouterr().err


def test_long_prompts(small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "red " * 80, "--model", str(small_folder), "--steps", "1", "--quiet", "--out", str(tmp_path)]
    assert main([*command, "--seed", "1", "--clip-skip", "1"]) == 0
    assert '"long_prompts": "chunk", "clip_skip": 1' in Image.open(tmp_path / "00000-1.png").text["twinstream"]
    assert main([*command, "--long-prompts", "error"]) == 1
    assert "prompts must fit into one chunk of 75 tokens" in capsys.readouterr().err


def test_seeds(small_folder: Path, tmp_path: Path) -> None:
    command = ["generate", "--seed", "9,4", "a cat", "a dog", "--model", str(small_folder), "--steps", "1", "--quiet"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000-9.png", "00001-4.png"]


def test_info(small_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", str(small_folder)]) == 0
    printed = capsys.readouterr().out
    native = ", ".join(levels()) or "not built"
    geglu = "native: native.layer_norm_geglu" if levels() else "torch: layer_norm_geglu.layer_norm_geglu_ref"
    for part in ("twinstream", "torch", "gpu", f"native kernels    {native}", "attention", geglu, "M parameters"):
        assert part in printed


def test_train_and_use_a_concept(small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures, file, out = tmp_path / "pictures", tmp_path / "cat.safetensors", tmp_path / "out"
    pictures.mkdir()
    Image.new("RGB", (20, 16), "red").save(pictures / "a.png")
    train = ["train", "infusion", str(pictures), "--noun", "cat", "--out", str(file), "--model", str(small_folder)]
    short = ["--steps", "2", "--batch-size", "1", "--quiet"]
    assert main([*train, *short, "--folder", str(tmp_path / "run"), "--sample-every", "0"]) == 0
    assert f"{file.stat().st_size} bytes" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    draw = ["generate", "a cat", "--model", str(small_folder), "--concept", str(file), "--steps", "1", "--quiet"]
    assert main([*draw, "--seed", "5", "--grid", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["00000-5-foundation.png", "00000-5.png", "grid.png"]
    assert Image.open(out / "grid.png").size == (32, 16)
    custom, plain = (Image.open(out / f"00000-5{end}.png").text["parameters"] for end in ("", "-foundation"))
    assert "Infusion: cat" in custom
    assert "Infusion" not in plain
    assert main([*draw, "--foundation", "shared", "--out", str(tmp_path / "shared")]) == 0
    assert len(list((tmp_path / "shared").iterdir())) == 1


def test_bad_concepts_are_told_before_the_work(small_folder: Path, tmp_path: Path, capsys) -> None:
    train = ["train", "infusion", str(tmp_path), "--noun", "cat", "--model", str(small_folder)]
    for command, message in (
        ([*train, "--out", str(tmp_path / "none" / "x")], "out must be a file in an existing folder"),
        ([*train, "--out", str(tmp_path / "x"), "--file-dtype", "int4"], "file-dtype must be one of float16, int8"),
        ([*train, "--out", str(tmp_path / "x")], "images must hold at least one of .jpg"),
        (["generate", "a cat", "--concept", str(tmp_path / "x")], "x: cannot be read: No such file"),
        (["generate", "a cat", "--concept", str(tmp_path / "x"), "--dci", "cat"], "cannot be read"),
        (["generate", "a cat", "--dci", "dog", "--model", str(small_folder)], "the prompt must contain 'dog'"),
        (["generate", "a cat", "--dci-strength", "2"], "dci-strength belongs to two branches: give --dci too, got 2.0"),
        (["generate", "a cat", "--foundation", "shared"], "foundation belongs to Infusion concepts: give"),
    ):
        assert main(command) == 1
        assert message in capsys.readouterr().err


def test_dci(small_folder: Path, tmp_path: Path) -> None:
    options = ["--dci", "cat", "--auxiliary-noun", "owl", "--dci-strength", "-1.5", "--steps", "2", "--quiet"]
    assert main(["generate", "a cat", "--model", str(small_folder), *options, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    assert "DCI: cat with owl -1.5" in Image.open(path).text["parameters"]


def test_train_and_use_an_ico_concept(small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures, file = tmp_path / "pictures", tmp_path / "violet.safetensors"
    pictures.mkdir()
    Image.new("RGB", (20, 16), "red").save(pictures / "a.png")
    train = ["train", "ico", str(pictures), "--noun", "cat", "--out", str(file), "--model", str(small_folder)]
    assert main([*train, "--steps", "2", "--batch-size", "1", "--rank", "2", "--prior-images", "1", "--quiet"]) == 0
    draw = ["generate", "a V* cat", "--model", str(small_folder), "--concept", str(file), "--steps", "2", "--quiet"]
    for number, (options, described) in enumerate((([], "ICO: violet"), (["--dci", "V*"], "DCI: violet with dog 1"))):
        out = tmp_path / str(number)
        assert main([*draw, *options, "--out", str(out)]) == 0
        (path,) = out.iterdir()
        assert described in Image.open(path).text["parameters"]
    capsys.readouterr()
    for command, message in (
        ([*draw, "--dci", "cat"], "dci must be the placeholder of one of the concepts (V*), got 'cat'"),
        ([*draw, "--foundation", "shared"], "foundation belongs to Infusion concepts"),
        ([*train, "--rank", "0"], "rank must be an integer >= 1"),
        ([*train, "--rank", "2", "--no-train-kv"], "rank belongs to keys and values"),
    ):
        assert main(command) == 1
        assert message in capsys.readouterr().err
