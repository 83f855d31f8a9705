"""ControlNets and image prompts of rows: files by where they lie, keys by what is in them, one call for like rows."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import engine
from engine.cli import main
from engine.methods.asked_pictures import NetFiles
from engine.serve import bulk
from engine.serve.bulk import Painter, Row, make_row, read_rows, run_bulk
from tests.controlnets import hint, listen, random_controlnet
from tests.ip_adapters import load_adapter, picture

QUICK = {"steps": 2, "guidance_scale": 2.0}


@pytest.fixture
def folder(small: engine.Engine, small_folder: Path, tmp_path: Path) -> Path:
    """With networks, and pictures of both."""
    for i, name in enumerate(("edges", "depth")):
        random_controlnet(small, tmp_path / name, small_folder, seed=i)
        listen(tmp_path / name)
    load_adapter(small, tmp_path, "plain")
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        hint(i).save(tmp_path / "pictures" / f"hint-{i}.png")
        picture(i).save(tmp_path / "pictures" / f"like-{i}.png")
    return tmp_path


def _row(given: Mapping[str, Any], folder: Path, nets: NetFiles | None = None) -> Row:
    return make_row({"prompt": "a cat", "seed": 1, **QUICK, **given}, "a model", nets, folder)


def _control(i: int, **more: Any) -> dict[str, Any]:
    return {"net": "edges", "image": f"pictures/hint-{i}.png", **more}


def _like(*numbers: int, **more: Any) -> dict[str, Any]:
    return {"adapter": "plain-0.safetensors", "image": [f"pictures/like-{i}.png" for i in numbers], **more}


def test_rows_draw_what_generate_draws(
    small: engine.Engine, small_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that differ in pictures alone share a call, whatever their image prompts are."""
    rows = [
        _row({"control": [_control(0, weight=0.8)]}, folder),
        _row({"control": [_control(1, weight=0.8)], "image_prompts": [_like(0, 1, scale=0.5), _like(2)]}, folder),
        _row({"control": [_control(1, weight=0.8, end=0.5)]}, folder),
        _row({"control": [_control(0), _control(2, net="depth", guess_mode=True)]}, folder),
        _row({"image_prompts": [_like(1)]}, folder),
        _row({}, folder),
    ]
    groups: list[list[str]] = []
    inner = Painter._draw_together
    monkeypatch.setattr(
        Painter,
        "_draw_together",
        lambda self, group: groups.append([row.key for row, _ in group]) or inner(self, group),
    )
    statuses = {one.key: one for one in run_bulk(rows, folder / "out", {"model": small_folder})}
    assert [statuses[row.key].error for row in rows] == [""] * len(rows)
    keys = [row.key for row in rows]
    assert groups == [keys[:2], keys[2:3], keys[3:4], keys[4:]]
    edges, depth = (engine.load_controlnet(folder / name, small) for name in ("edges", "depth"))
    plain = engine.IPAdapter.load(folder / "plain-0.safetensors", small, folder / "image_encoder")

    def like(*numbers: int, scale: float = 1.0) -> engine.ImagePrompt:
        return engine.ImagePrompt(plain, [picture(i) for i in numbers], scale)

    expected: list[dict[str, Any]] = [
        {"control": [engine.Control(edges, hint(0), 0.8)]},
        {"control": [engine.Control(edges, hint(1), 0.8)], "image_prompts": [like(0, 1, scale=0.5), like(2)]},
        {"control": [engine.Control(edges, hint(1), 0.8, end=0.5)]},
        {"control": [engine.Control(edges, hint(0)), engine.Control(depth, hint(2), guess_mode=True)]},
        {"image_prompts": [like(1)]},
        {},
    ]
    drawn = []
    for row, options in zip(rows, expected, strict=True):
        drawn.append(np.asarray(Image.open(folder / "out" / f"{row.key}.png")).astype(int))
        alone = small.generate("a cat", seed=1, progress=False, **QUICK, **options)
        assert abs(drawn[-1] - np.asarray(alone.images[0])).max() <= 1
        told = json.loads(Image.open(folder / "out" / f"{row.key}.png").text["twinstream"])
        assert told["control"] == alone.settings["control"]
        assert told["image_prompts"] == alone.settings["image_prompts"][0]
    assert all(abs(one - other).max() > 1 for i, one in enumerate(drawn) for other in drawn[:i])


def test_paths_are_relative_to_the_rows_and_names_to_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder / "pictures")
    nets = NetFiles({"mine": "../edges"}, {"style": ("../plain-0.safetensors", "../image_encoder")})
    file = folder / "rows.jsonl"
    lines: list[dict[str, Any]] = [
        {"control": [_control(0, net="mine")], "image_prompts": [{**_like(0), "adapter": "style"}]},
        {"control": [_control(0)], "image_prompts": [_like(0, image_encoder="pictures")]},
    ]
    file.write_text("\n".join(json.dumps({"prompt": "a", "seed": i, **one}) for i, one in enumerate(lines)))
    (named, plain), wrong = read_rows(file, "a model", nets)
    assert not wrong
    assert Path(named.control[0].net).samefile(folder / "edges")
    assert Path(named.image_prompts[0].adapter).samefile(folder / "plain-0.safetensors")
    assert Path(named.image_prompts[0].image_encoder or "").samefile(folder / "image_encoder")
    assert Path(plain.control[0].net) == folder / "edges"
    assert plain.control[0].image == str(folder / "pictures" / "hint-0.png")
    assert plain.image_prompts[0].image == (str(folder / "pictures" / "like-0.png"),)
    assert plain.image_prompts[0].image_encoder == str(folder / "pictures")
    for row in (named, plain):
        paths = [row.control[0].net, row.control[0].image, row.image_prompts[0].adapter]
        assert all(Path(str(path)).is_absolute() for path in paths)


def test_keys_follow_from_what_is_in_the_files(folder: Path) -> None:
    given = {"control": [_control(0)], "image_prompts": [_like(0)]}
    keys = [_row(given, folder).key]
    nets = NetFiles({"mine": str(folder / "edges")})
    assert _row({**given, "control": [_control(0, net="mine")]}, folder, nets).key == keys[0], "whatever its name"
    others: list[dict[str, Any]] = [
        {},
        {"control": [_control(0)]},
        {"image_prompts": [_like(0)]},
        {"control": [_control(0, weight=0.5)], "image_prompts": [_like(0)]},
        {"control": [_control(1)], "image_prompts": [_like(0)]},
        {"control": [_control(0)], "image_prompts": [_like(0, scale=0.5)]},
        {"control": [_control(0)], "image_prompts": [_like(0, 1)]},
        {"control": [_control(0, net="depth")], "image_prompts": [_like(0)]},
    ]
    keys += [_row(one, folder).key for one in others]
    for path in ("pictures/hint-0.png", "pictures/like-0.png"):
        hint(9).save(folder / path)
        keys.append(_row(given, folder).key)
    for path in (
        "edges/diffusion_pytorch_model.safetensors", "edges/config.json", "plain-0.safetensors",
        "image_encoder/model.safetensors",
    ):  # fmt: skip
        data = (folder / path).read_bytes()
        (folder / path).write_bytes(data[:-1] + b" ")
        keys.append(_row(given, folder).key)
    (folder / "edges" / "README.md").write_text("what is not read")
    assert _row(given, folder).key == keys[-1]
    assert len(set(keys)) == len(keys)


def test_keys_of_rows_without_them_are_as_before() -> None:
    assert make_row({"prompt": "a cat", "seed": 1}, "a model").key == "378066bcf2db81f34d9e"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"control": "edges"}, "control must be a list of objects, got 'edges'"),
        ({"control": [{"net": "edges"}]}, r"control\[0\].image must be one text or several, got nothing"),
        ({"control": [_control(0, image=["a.png", "b.png"])]}, r"control\[0\].image must be one picture's file"),
        ({"image_prompts": [{"image": "a.png"}]}, r"image_prompts\[0\].adapter must be a text"),
        (
            {"image_prompts": [{"adapter": "style", "image": "a.png", "image_encoder": "b"}]},
            r"image_prompts\[0\].image_encoder belongs to an adapter's file; 'style' is named with its own, got 'b'",
        ),
    ],
)
def test_what_is_no_row_is_refused(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        _row(given, tmp_path, NetFiles({}, {"style": ("a", "b")}))


def test_a_row_that_fails_costs_the_others_nothing(small_folder: Path, folder: Path) -> None:
    good = _row({"control": [_control(0)], "image_prompts": [_like(0)]}, folder)
    bad = [
        _row({"control": [_control(0, net="nowhere")]}, folder),
        _row({"control": [_control(7)]}, folder),
        _row({"control": [_control(0, weight=1000)]}, folder),
        _row({"image_prompts": [_like(0, adapter="nowhere.safetensors")]}, folder),
        _row({"image_prompts": [_like(0, image_encoder="nowhere")]}, folder),
    ]
    found = {one.key: one for one in run_bulk([*bad, good], folder / "out", {"model": small_folder})}
    assert found[good.key].status == "drawn"
    for row, words in zip(bad, ("nowhere", "hint-7.png", "control[0]: weight must", "nowhere", "nowhere"), strict=True):
        assert (found[row.key].status, words in found[row.key].error) == ("error", True), found[row.key].error


def test_networks_are_loaded_once(small_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    inner = bulk.load_controlnet
    monkeypatch.setattr(bulk, "load_controlnet", lambda path, sd: loaded.append(str(path)) or inner(path, sd))
    rows = [_row({"seed": i, "control": [_control(i)]}, folder) for i in range(3)]
    statuses = list(run_bulk(rows, folder / "out", {"model": small_folder}, batch_size=1))
    assert [one.status for one in statuses] == ["drawn"] * 3
    assert loaded == [str(folder / "edges")]


def test_the_command_names_networks(small_folder: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"control": [_control(0, net="mine")]}, {"image_prompts": [{**_like(0), "adapter": "style"}]}]
    file = folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": "a", "seed": 1, **QUICK, **one}) for one in rows))
    command = ["batch", str(file), "--model", str(small_folder), "--out", str(folder / "out"), "--quiet"]
    assert main([*command, "--control", f"mine={folder / 'edges'}"]) == 1
    said = capsys.readouterr()
    assert "1 drawn, 0 there, 1 error" in said.out
    assert "style" in said.err
    more = ["--image-prompt-adapter", f"style={folder / 'plain-0.safetensors'}"]
    assert main([*command, "--control", f"mine={folder / 'edges'}", *more]) == 0
    assert "1 drawn, 1 there, 0 error" in capsys.readouterr().out


def test_ray_draws_the_same_pictures(small_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    from engine.serve.ray_bulk import paint

    monkeypatch.setenv("RAY_worker_niceness", "0")
    rows = [_row({"seed": i, "control": [_control(i)], "image_prompts": [_like(i)]}, folder) for i in range(2)]
    here, there = (
        {one.key: one for one in run_bulk(rows, folder / name, {"model": small_folder}, paint=how)}
        for name, how in (("here", None), ("there", paint))
    )
    assert [here[row.key].status for row in rows] == ["drawn"] * 2
    assert {k: (v.status, v.sha256) for k, v in here.items()} == {k: (v.status, v.sha256) for k, v in there.items()}
