"""ControlNets and image prompts out of text."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import engine
from engine.methods.asked_pictures import (
    AskedControl,
    AskedImagePrompt,
    NetFiles,
    asked_image_prompts,
    encoder_of,
    read_asked,
    read_net_files,
)
from tests.ip_adapters import load_adapter, picture


def test_what_json_asks_for() -> None:
    given = [{"net": "a", "image": "b", "weight": 2, "guess_mode": True}, {"net": "a", "image": ["b", "c"], "end": 0.5}]
    assert read_asked("control", AskedControl, given) == (
        AskedControl(net="a", image="b", weight=2, guess_mode=True),
        AskedControl(net="a", image=["b", "c"], end=0.5),
    )
    assert read_asked("control", AskedControl, None) == read_asked("control", AskedControl, []) == ()
    (prompt,) = read_asked("image_prompts", AskedImagePrompt, [{"adapter": "a", "image": "b"}])
    assert (prompt.scale, prompt.image_encoder) == (1.0, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"net": "a"}, r"control must be a list of objects, got \{'net': 'a'\}"),
        (["a"], r"control\[0\] must be an object, got 'a'"),
        ([{"net": "a", "image": "b"}, {"net": "a"}], r"control\[1\].image must be one text or several, got nothing"),
        ([{"image": "b"}], r"control\[0\].net must be a text, got nothing"),
        ([{"net": 3, "image": "b"}], r"control\[0\].net must be a text, got 3"),
        ([{"net": "", "image": "b"}], r"control\[0\].net must be a text, got ''"),
        ([{"net": "a", "image": []}], r"control\[0\].image must be one text or several, got \[\]"),
        ([{"net": "a", "image": ["b", 3]}], r"control\[0\].image must be one text or several, got \['b', 3\]"),
        ([{"net": "a", "image": "b", "wait": 1}], r"control\[0\] has no 'wait'; it has net, image, weight, start, end"),
    ],
)
def test_what_is_none_is_told(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_asked("control", AskedControl, given)


def test_networks_of_a_command_line() -> None:
    assert read_net_files(["a=b/c=d", "e=f"], ["g=h/i.safetensors", "j=k.safetensors"], None) == NetFiles(
        {"a": "b/c=d", "e": "f"},
        {"g": ("h/i.safetensors", "h/image_encoder"), "j": ("k.safetensors", "image_encoder")},
    )
    assert read_net_files([], ["g=h/i.safetensors"], Path("x")).adapters["g"][1] == "x"
    assert encoder_of("a/b.safetensors", None) == "a/image_encoder"
    for controls, adapters, message in (
        (["a"], [], "control must be NAME=FILE, got 'a'"),
        (["=a"], [], "control must be NAME=FILE, got '=a'"),
        ([], ["a="], "image-prompt-adapter must be NAME=FILE, got 'a='"),
        (["a=b", "a=c"], [], "control must have a name of its own, got 'a' twice"),
    ):
        with pytest.raises(ValueError, match=message):
            read_net_files(controls, adapters, None)
    with pytest.raises(ValueError, match="image-encoder belongs to image-prompt-adapter: give one too, got 'x'"):
        read_net_files(["a=b"], [], Path("x"))


def test_image_prompts_of_a_command_line(small: engine.Engine, tmp_path: Path) -> None:
    load_adapter(small, tmp_path, "plain")
    file, pictures = tmp_path / "plain-0.safetensors", [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(pictures):
        picture(i).save(path)
    texts = [f"{file}={pictures[0]}", f"{file}={pictures[1]}:-0.5"]
    for encoder in (None, tmp_path / "image_encoder"):
        first, second = asked_image_prompts(texts, encoder, small)
        assert first.adapter is second.adapter, "loaded once"
        assert (first.scale, second.scale) == (1.0, -0.5)
        assert second.image[0].tobytes() == Image.open(pictures[1]).tobytes()
    for text in ("a", "=a", "a=", f"{file}={pictures[0]}:", f"{file}={pictures[0]}:1:2", f"{file}={pictures[0]}:much"):
        with pytest.raises(ValueError, match="image-prompt must be ADAPTER=PICTURE or ADAPTER=PICTURE:SCALE, got"):
            asked_image_prompts([text], None, small)
    with pytest.raises(ValueError, match="image-encoder belongs to image-prompt: give one too, got"):
        asked_image_prompts([], tmp_path, small)
    with pytest.raises(ValueError, match=r"nowhere\.png: cannot be read as a picture"):
        asked_image_prompts([f"{file}={tmp_path / 'nowhere.png'}"], None, small)
