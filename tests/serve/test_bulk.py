"""Bulk runs: resumable, whole or not there, and a bad row costs the others nothing."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import engine
from engine.cli import main
from engine.loading import model_digest
from engine.methods.asked import Asked
from engine.serve import bulk
from engine.serve.bulk import Painter, Row, Status, read_rows, run_bulk
from engine.weights.checkpoint import EMBEDDED_MODEL
from tests.loras import write_kohya

QUICK = {"steps": 2, "guidance_scale": 2.0}
STRIPED = str(Path(engine.__file__).parent / "assets" / "concepts" / "striped-cat.safetensors")


def make_row(given: object) -> Row:
    return bulk.make_row(given, "a model")  # type: ignore[arg-type]


def _rows(n: int, **more: object) -> list[bulk.Row]:
    return [make_row({"prompt": f"a cat {i}", "seed": i, **QUICK, **more}) for i in range(n)]


def _write(path: Path, rows: list[object]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_pictures_are_those_of_generate_with_their_settings(tmp_path: Path) -> None:
    rows = [
        make_row({"prompt": "a red cat", "seed": 3, "negative_prompt": "blue", **QUICK}),
        make_row({"prompt": "a photo of a cat", "seed": 4, "concepts": [STRIPED], "concept_strength": 0.5, **QUICK}),
        make_row({"prompt": "a boat", "seed": 5, "latents": True, "sampler": "euler", **QUICK}),
    ]
    statuses = {one.key: one for one in run_bulk(rows, tmp_path, {})}
    assert [statuses[row.key].status for row in rows] == ["drawn"] * 3
    sd = engine.load()
    alone = [
        sd.generate("a red cat", seed=3, negative_prompt="blue", progress=False, **QUICK),
        sd.generate(
            "a photo of a cat",
            seed=4,
            customization=engine.Infusion([engine.Concept.load(STRIPED)], strength=0.5),
            progress=False,
            **QUICK,
        ),
        sd.generate("a boat", seed=5, sampler="euler", progress=False, **QUICK),
    ]
    for row, one in zip(rows, alone, strict=True):
        drawn = np.asarray(Image.open(tmp_path / f"{row.key}.png")).astype(int)
        assert np.abs(drawn - np.asarray(one.images[0])).max() <= 1  # a batch rounds otherwise
        assert json.loads(Image.open(tmp_path / f"{row.key}.png").text["twinstream"])["seed"] == row.options["seed"]
    np.testing.assert_allclose(np.load(tmp_path / f"{rows[2].key}.npy"), alone[2].latents[0], atol=5e-3)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".npy", ".png", ".png", ".png"]


def test_a_rerun_draws_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _rows(5)
    first = list(run_bulk(rows, tmp_path, {}, batch_size=2))
    (tmp_path / f"{rows[3].key}.png").unlink()
    seen = []
    inner = Painter._draw_together
    monkeypatch.setattr(Painter, "_draw_together", lambda self, group: seen.extend(group) or inner(self, group))
    again = {one.key: one for one in run_bulk(rows, tmp_path, {}, batch_size=2)}
    assert [row.key for row, _ in seen] == [rows[3].key]
    assert [again[row.key].status for row in rows] == ["there", "there", "there", "drawn", "there"]
    before = {one.key: one.sha256 for one in first}
    for row in rows[:3] + rows[4:]:
        assert again[row.key].sha256 == before[row.key]


def test_a_batch_that_is_painted_again_tells_what_is_there(tmp_path: Path) -> None:
    """As when an actor has died in it; the driver did not see those pictures."""
    rows, painter = _rows(3), Painter(tmp_path, {})
    (first,) = painter(rows[1:2])
    again = painter(rows)
    assert [(one.key, one.status) for one in again] == [
        (row.key, status) for row, status in zip(rows, ("drawn", "there", "drawn"), strict=True)
    ]
    assert again[1].sha256 == first.sha256


@pytest.mark.parametrize(
    "command", [["batch", "rows.jsonl", "--actors", "2"], ["serve", "--replicas", "2"], ["serve", "--gpus", "0.5"]]
)
def test_options_of_ray_are_refused_without_it(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) != 0
    assert f"{command[-2].strip('-')} belongs to Ray: give --ray too, got [" in capsys.readouterr().err


def test_a_run_that_dies_leaves_whole_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, written = _rows(4), []

    def failing(path: Path, data: bytes) -> None:
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(path)
        inner(path, data)

    inner = bulk.write_atomically
    monkeypatch.setattr(bulk, "write_atomically", failing)
    with pytest.raises(KeyboardInterrupt):
        list(run_bulk(rows, tmp_path, {}))
    assert list(tmp_path.iterdir()) == written
    Image.open(written[0]).load()


def test_a_row_that_fails_is_told_and_the_others_are_drawn(tmp_path: Path) -> None:
    rows = _rows(2)
    bad = [
        make_row({"prompt": "a cat", "seed": 1, "steps": 0}),
        make_row({"prompt": "a boat", "seed": 1, "concepts": [STRIPED], **QUICK}),  # found when rows are laid out
        make_row({"prompt": "a cat", "seed": 1, "concepts": ["nowhere.safetensors"], **QUICK}),
        make_row({"prompt": "a cat", "seed": 1, "dci_strength": 2.0, **QUICK}),
        make_row({"prompt": "a cat", "seed": 1, "height": 100, **QUICK}),
    ]
    found = {one.key: one for one in run_bulk([rows[0], *bad, rows[1]], tmp_path, {})}
    assert [found[row.key].status for row in rows] == ["drawn"] * 2
    for row, words in zip(bad, ("steps must", "'cat'", "nowhere", "dci-strength", "height must"), strict=True):
        assert found[row.key].status == "error"
        assert words in found[row.key].error


def test_keys_follow_from_what_decides_the_picture() -> None:
    row = make_row({"prompt": "a cat", "seed": 1})
    assert make_row({"seed": 1, "prompt": "a cat"}).key == row.key
    others = [
        {"prompt": "a dog", "seed": 1},
        {"prompt": "a cat", "seed": 2},
        {"prompt": "a cat", "seed": 1, "steps": 9},
    ]
    others.append({"prompt": "a cat", "seed": 1, "concepts": ["a"]})
    assert len({row.key, *(make_row(other).key for other in others)}) == 5
    assert make_row({"prompt": "a cat", "seed": 1, "id": "my-cat_1"}).key == "my-cat_1"
    assert make_row({"prompt": "a", "seed": 1, "dci": "cat"}).asked == Asked(dci="cat")


def test_keys_follow_from_content_that_a_row_names(tmp_path: Path) -> None:
    concept, given = tmp_path / "cat.safetensors", {"prompt": "a cat", "seed": 1}
    concept.write_bytes(Path(STRIPED).read_bytes())
    asked = given | {"concepts": [str(concept)]}
    before = make_row(asked).key
    assert make_row(asked).key == before
    engine.Concept.load(STRIPED).save(concept, dtype="int8")
    assert make_row(asked).key != before
    assert bulk.make_row(given, "another model").key != make_row(given).key


def test_a_model_is_told_by_its_content_and_dtype(small: engine.Engine, small_folder: Path, tmp_path: Path) -> None:
    there, edited = tmp_path / "there", tmp_path / "edited"
    shutil.copytree(small_folder, there)
    shutil.copytree(small_folder, edited)
    weights = edited / "unet" / "diffusion_pytorch_model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    digest = model_digest({"model": small_folder})
    assert model_digest({"model": there, "backend": "torch"}) == digest
    assert model_digest({"model": edited}) != digest
    file = write_kohya(small, tmp_path / "one.safetensors")
    loras = [model_digest({"model": there, "loras": [engine.LoRA(file, weight)]}) for weight in (1.0, 0.5, 1.0)]
    assert len({digest, *loras}) == 3
    assert model_digest({"model": there, "vae": EMBEDDED_MODEL}) != digest
    assert model_digest({"model": there, "dtype": "bfloat16"}) != digest
    vocabulary = there / "tokenizer" / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text() + "\n")
    assert model_digest({"model": there}) != digest


def test_a_picture_without_the_latents_that_are_asked_for_is_not_there(tmp_path: Path) -> None:
    (plain,) = list(run_bulk(_rows(1), tmp_path, {}))
    (row,) = _rows(1, latents=True)
    (status,) = list(run_bulk([row], tmp_path, {}))
    assert (plain.status, status.status, status.key) == ("drawn", "drawn", plain.key)
    assert all(path.exists() for path in row.files(tmp_path))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([], "JSON object"),
        ({"seed": 1}, "prompt must"),
        ({"prompt": "a"}, "seed must"),
        ({"prompt": "a", "seed": -1}, "seed must"),
        ({"prompt": "a", "seed": 1, "callback": 1}, "no 'callback'"),
        ({"prompt": "a", "seed": 1, "id": "../a"}, "id must"),
        ({"prompt": "a", "seed": 1, "id": ""}, "id must"),
    ],
)
def test_what_is_no_row_is_refused(row: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_row(row)


def test_lines_that_are_no_rows_are_told_by_number(tmp_path: Path) -> None:
    rows, wrong = read_rows(_write(tmp_path / "rows", [{"prompt": "a", "seed": 1}, "", "{", {"prompt": 3}]), "a model")
    assert [row.prompt for row in rows] == ["a"]
    assert [(one.key, one.status) for one in wrong] == [("line-3", "error"), ("line-4", "error")]
    with pytest.raises(ValueError, match=r"line 2.*twice"):
        read_rows(_write(tmp_path / "twice", [{"prompt": "a", "seed": 1}] * 2), "a model")
    with pytest.raises(ValueError, match="nowhere"):
        read_rows(tmp_path / "nowhere", "a model")


def test_command_writes_pictures_and_statuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"prompt": "a cat", "seed": 1, "id": "one", **QUICK}, {"prompt": "a cat"}]
    rows, out = _write(tmp_path / "rows.jsonl", lines), tmp_path / "out"
    assert main(["batch", str(rows), "--out", str(out), "--quiet"]) == 1
    said = capsys.readouterr()
    assert "1 drawn, 0 there, 1 error" in said.out
    assert "step/s" not in said.err
    assert "2/2" not in said.err
    statuses = [json.loads(line) for line in (out / "status.jsonl").read_text().splitlines()]
    assert [(one["key"], one["status"]) for one in statuses] == [("line-2", "error"), ("one", "drawn")]
    assert main(["batch", str(rows), "--out", str(out), "--actors", "2"]) == 1
    assert "give --ray too" in capsys.readouterr().err


def test_ray_draws_the_same_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    from engine.serve.ray_bulk import paint

    monkeypatch.setenv("RAY_worker_niceness", "0")  # Ray's actors would starve beside the other tests
    rows = [*_rows(3), make_row({"prompt": "a boat", "seed": 1, "concepts": [STRIPED], **QUICK})]
    here = {one.key: one for one in run_bulk(rows, tmp_path / "here", {}, batch_size=4)}
    there = {one.key: one for one in run_bulk(rows, tmp_path / "there", {}, batch_size=4, paint=paint)}
    assert {k: (v.status, v.sha256, v.error) for k, v in here.items()} == {
        k: (v.status, v.sha256, v.error) for k, v in there.items()
    }
    assert Status("a", "drawn").error == ""


def test_a_picture_has_its_share_of_its_batchs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 16.0])
    monkeypatch.setattr(bulk, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    assert [one.seconds for one in run_bulk(_rows(3), tmp_path, {})] == [2.0] * 3
