"""The command line."""

from pathlib import Path

import pytest
from PIL import Image

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


def test_seeds(small_folder: Path, tmp_path: Path) -> None:
    command = ["generate", "--seed", "9,4", "a cat", "a dog", "--model", str(small_folder), "--steps", "1", "--quiet"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000-9.png", "00001-4.png"]


def test_info(small_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", str(small_folder)]) == 0
    printed = capsys.readouterr().out
    for part in ("twinstream", "torch", "gpu", "attention", "torch: geglu.geglu_ref", "M parameters"):
        assert part in printed
