"""``twinstream generate`` from settings in a picture, from prompts that vary, and from a folder of pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import engine
from engine.cli import main
from tests.controlnets import hint, listen, random_controlnet
from tests.ip_adapters import load_adapter, picture


def _draw(folder: Path, out: Path, *more: str) -> int:
    quick = [] if "--steps" in more or "--from" in more else ["--steps", "2"]
    return main(["generate", *more, *quick, "--model", str(folder), "--quiet", "--out", str(out)])


def _settings(path: Path) -> dict:
    return json.loads(Image.open(path).text["twinstream"])


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_from_a_picture(small_folder: Path, tmp_path: Path) -> None:
    given = ["--seed", "5", "--sampler", "dpmpp_2m", "--schedule", "karras", "--size", "20x12", "--steps", "3"]
    assert _draw(small_folder, tmp_path / "a", "a (red:1.2) cat", *given, "--negative-prompt", "dark") == 0
    first = tmp_path / "a" / "00000-5.png"
    assert _draw(small_folder, tmp_path / "b", "--from", str(first)) == 0
    assert np.array_equal(_pixels(tmp_path / "b" / "00000-5.png"), _pixels(first))
    assert _settings(tmp_path / "b" / "00000-5.png") == _settings(first)


def test_flags_go_before_a_pictures_settings(small_folder: Path, tmp_path: Path) -> None:
    given = ["--seed", "5", "--sampler", "dpmpp_2m", "--schedule", "karras", "--upscale", "1.5", "--steps", "4"]
    assert _draw(small_folder, tmp_path / "a", "a cat", *given, "--upscale-steps", "3") == 0
    first = tmp_path / "a" / "00000-5.png"
    more = ["a dog", "--seed", "8", "--sampler", "ddim", "--size", "12x12", "--count", "2", "--upscale", "1"]
    assert _draw(small_folder, tmp_path / "b", "--from", str(first), *more) == 0
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["00000-8.png", "00001-9.png"]
    before, after = _settings(first), _settings(tmp_path / "b" / "00001-9.png")
    changed = {name for name in before if before[name] != after[name]}
    size = {"width", "height"}
    assert changed == {"prompt", "seed", "sampler", "schedule", "upscale", "upscale_steps"} | size
    assert after["schedule"] is None, "another sampler has another schedule"


def test_from_a_picture_of_a1111(small_folder: Path, tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("parameters", "a cat\nSteps: 3, Sampler: Euler a, CFG scale: 5, Seed: 6, Size: 16x16, ENSD: 31337")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.warns(UserWarning, match="ensd: 31337"):
        assert _draw(small_folder, tmp_path / "b", "--from", str(tmp_path / "a.png")) == 0
    found = _settings(tmp_path / "b" / "00000-6.png")
    assert (found["steps"], found["sampler"], found["guidance_scale"]) == (3, "euler_ancestral", 5.0)


def test_dci_comes_from_a_picture(small_folder: Path, tmp_path: Path) -> None:
    assert _draw(small_folder, tmp_path / "a", "a cat", "--seed", "1", "--dci", "cat", "--dci-fraction", "0.5") == 0
    first = tmp_path / "a" / "00000-1.png"
    assert _draw(small_folder, tmp_path / "b", "--from", str(first)) == 0
    assert np.array_equal(_pixels(tmp_path / "b" / "00000-1.png"), _pixels(first))
    assert _draw(small_folder, tmp_path / "c", "--from", str(first), "--dci", "cat", "--auxiliary-noun", "owl") == 0
    assert _settings(tmp_path / "c" / "00000-1.png")["customization"]["auxiliary_noun"] == "owl"


def test_wildcards(small_folder: Path, tmp_path: Path) -> None:
    words = tmp_path / "words"
    words.mkdir()
    (words / "colour.txt").write_text("red\nblue\ngreen\n")
    given = ["a __colour__ {cat|dog}", "a {bird|tree}", "--wildcards", str(words), "--negative-prompt", "{dark|light}"]
    assert _draw(small_folder, tmp_path / "a", *given, "--count", "3", "--seed", "4") == 0
    found = [_settings(path) for path in sorted((tmp_path / "a").iterdir())]
    assert [one["seed"] for one in found] == [4, 5, 6, 7, 8, 9]
    assert all(one["prompt"].split()[1] in ("red", "blue", "green") for one in found[:3])
    assert all(one["prompt"] in ("a bird", "a tree") for one in found[3:])
    assert all(one["negative_prompt"] in ("dark", "light") for one in found)
    assert len({one["prompt"] for one in found[:3]}) > 1
    assert _draw(small_folder, tmp_path / "b", given[0], *given[2:], "--seed", "6") == 0
    (alone,) = (tmp_path / "b").iterdir()
    assert _settings(alone)["prompt"] == found[2]["prompt"], "the image's seed decides, whatever it is drawn beside"
    assert _draw(small_folder, tmp_path / "c", given[0], *given[2:], "--count", "2") == 0
    one, other = (_settings(path) for path in sorted((tmp_path / "c").iterdir()))
    assert one["seed"] != other["seed"]
    assert _draw(small_folder, tmp_path / "d", given[0], *given[2:], "--seed", "4", "--variation-strength", "0.5") == 0


def test_a_folder_of_pictures(small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures, out = tmp_path / "in", tmp_path / "out"
    pictures.mkdir()
    for name, size in (("b.png", (16, 16)), ("a.JPG", (24, 12))):
        Image.new("RGB", size, "red").save(pictures / name)
    (pictures / "broken.png").write_text("no picture")
    (pictures / "notes.txt").write_text("no picture either")
    given = ["a cat", "--image", str(pictures), "--strength", "0.5", "--seed", "3", "--steps", "4"]
    assert _draw(small_folder, out, *given) == 1
    told = capsys.readouterr()
    assert "broken.png: cannot be read as a picture" in told.err
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png"]
    assert f"{out / 'a.png'}  a cat" in told.out
    assert Image.open(out / "a.png").size == (24, 12)
    assert _settings(out / "b.png")["strength"] == 0.5
    (pictures / "broken.png").unlink()
    one = tmp_path / "one"
    assert _draw(small_folder, one, "a cat", "--image", str(pictures / "b.png"), *given[3:]) == 0
    assert np.array_equal(_pixels(one / "00000-3.png"), _pixels(out / "b.png"))
    assert _draw(small_folder, tmp_path / "two", *given, "--count", "2") == 0
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["a-0.png", "a-1.png", "b-0.png", "b-1.png"]
    assert _settings(tmp_path / "two" / "b-1.png")["seed"] == 4


def test_image_prompts_and_controls(
    small: engine.Engine, small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told in the picture's settings, and by ``--from``, which cannot bring them back."""
    load_adapter(small, tmp_path, "plain")
    random_controlnet(small, tmp_path / "edges", small_folder)
    listen(tmp_path / "edges")
    hint().save(tmp_path / "hint.png")
    for i in range(2):
        picture(i).save(tmp_path / f"{i}.png")
    adapter = tmp_path / "plain-0.safetensors"
    given = ["a cat", "--seed", "5", "--control", f"{tmp_path / 'edges'}={tmp_path / 'hint.png'}:0.5:0:0.8"]
    given += [
        "--image-prompt",
        f"{adapter}={tmp_path / '0.png'}:0.7",
        "--image-prompt",
        f"{adapter}={tmp_path / '1.png'}",
    ]
    assert _draw(small_folder, tmp_path / "a", *given, "--image-encoder", str(tmp_path / "image_encoder")) == 0
    first = tmp_path / "a" / "00000-5.png"
    plain = engine.IPAdapter.load(adapter, small, tmp_path / "image_encoder")
    ours = small.generate(
        "a cat", seed=5, steps=2, progress=False,
        control=engine.Control(engine.load_controlnet(tmp_path / "edges", small), hint(), 0.5, end=0.8),
        image_prompts=[engine.ImagePrompt(plain, picture(0), 0.7), engine.ImagePrompt(plain, picture(1))],
    )  # fmt: skip
    assert np.array_equal(_pixels(first), np.asarray(ours.images[0]))
    assert [one["scale"] for one in _settings(first)["image_prompts"]] == [0.7, 1.0]
    assert _settings(first)["control"][0]["weight"] == 0.5
    told = "ControlNets edges, with their pictures; image prompts of plain-0, plain-0, with their pictures"
    with pytest.warns(UserWarning, match=told):
        assert _draw(small_folder, tmp_path / "b", "--from", str(first)) == 0
    again = tmp_path / "b" / "00000-5.png"
    assert (_settings(again)["image_prompts"], _settings(again)["control"]) == ([], [])
    with pytest.warns(UserWarning, match=told):
        assert _draw(small_folder, tmp_path / "c", "--from", str(first), *given[3:]) == 0
    assert np.array_equal(_pixels(tmp_path / "c" / "00000-5.png"), _pixels(first))
    capsys.readouterr()
    assert _draw(small_folder, tmp_path / "d", "a cat", "--image-prompt", str(adapter)) == 1
    assert "image-prompt must be ADAPTER=PICTURE or ADAPTER=PICTURE:SCALE" in capsys.readouterr().err


def test_refusals(small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = tmp_path / "in"
    pictures.mkdir()
    Image.new("RGB", (16, 16)).save(pictures / "a.png")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.png").write_bytes(b"")
    twice = tmp_path / "twice"
    twice.mkdir()
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (16, 16)).save(twice / name)
    for out, command, message in (
        ("x", [], "prompt must be given, or --from a picture that has one, got none"),
        ("x", ["--from", str(pictures / "a.png")], "must hold settings as PNG text"),
        ("x", ["a __b__"], "__b__ needs a folder of wildcards: give --wildcards FOLDER"),
        ("x", ["a cat", "--wildcards", "/nowhere"], "wildcards must be a folder, got '/nowhere'"),
        ("x", ["a cat", "--image", str(pictures), "--grid"], "grid must not be given where image is a folder"),
        ("x", ["a cat", "--image", str(tmp_path / "there" / "..")], "image must be a folder with pictures"),
        ("x", ["a cat", "--image", str(twice)], "pictures with names of their own, got 'a' twice"),
        ("there", ["a cat", "--image", str(pictures)], "of which nothing is overwritten, got"),
        ("x", ["a cat", "--upscale-steps", "3"], "belong to a second pass: give upscale too"),
    ):
        assert _draw(small_folder, tmp_path / out, *command) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
