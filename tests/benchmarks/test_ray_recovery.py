"""A bulk run on Ray survives the death of an actor and of its driver; what is torn or missing is told."""

import hashlib
import json
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks.ray_recovery import _checked, recover


@pytest.mark.slow
def test_all_pictures_are_there_and_whole_after_both_deaths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # Ray's actors would starve beside the other tests
    happened = recover(60, tmp_path, actors=1, batch_size=2, steps=10)
    assert happened["second_run"]["there"] >= happened["there_when_driver_died"] >= 30
    assert happened["second_run"]["there"] + happened["second_run"]["drawn"] == 60 == happened["distinct_pictures"]


def _run(folder: Path) -> list[dict[str, object]]:
    """Two rows, their pictures and statuses."""
    lines, statuses = [{"id": f"row-{i}", "seed": i} for i in range(2)], []
    for line in lines:
        info, path = PngInfo(), folder / f"{line['id']}.png"
        info.add_text("twinstream", json.dumps({"seed": line["seed"]}))
        Image.new("RGB", (4, 4), (int(line["seed"]), 0, 0)).save(path, pnginfo=info)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        statuses.append(json.dumps({"key": line["id"], "status": "drawn", "sha256": digest}))
    (folder / "status.jsonl").write_text("\n".join(statuses))
    return lines


def test_what_is_missing_or_torn_is_told(tmp_path: Path) -> None:
    lines = _run(tmp_path)
    assert _checked(lines, tmp_path) == {"second_run": {"drawn": 2}, "distinct_pictures": 2}
    with pytest.raises(RuntimeError, match="picture of its row"):
        _checked([lines[0] | {"seed": 7}, lines[1]], tmp_path)
    (tmp_path / "row-2.png").touch()
    with pytest.raises(RuntimeError, match="each of 2 rows"):
        _checked(lines, tmp_path)
    (tmp_path / "row-2.png").unlink()
    whole = (tmp_path / "row-1.png").read_bytes()
    (tmp_path / "row-1.png").write_bytes(whole[:-20])
    with pytest.raises((RuntimeError, OSError, SyntaxError)):
        _checked(lines, tmp_path)
    (tmp_path / "row-1.png").unlink()
    with pytest.raises(RuntimeError, match="each of 2 rows"):
        _checked(lines, tmp_path)
