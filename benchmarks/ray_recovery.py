"""A bulk run on Ray that loses an actor, then its driver, and is started again: ``python -m benchmarks.ray_recovery``.

Kills with SIGKILL: one actor when a quarter of the pictures is there, the driver when half is. Then every row must
have one whole picture of its own, told by the status file by its hash. Writes ``benchmarks/results/ray-<date>.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from benchmarks.machine import RESULTS, machine, write_result

ROW = {"steps": 2, "guidance_scale": 1.0, "height": 64, "width": 64}
_ACTOR = "_Actor"  # in the title of ``ray_bulk``'s actors
_POLL_S, _PATIENCE_S = 0.05, 600.0


def recover(n_rows: int, folder: Path, actors: int = 2, batch_size: int = 8, **row: Any) -> dict[str, Any]:
    """Run, kill, run again and check.

    Args:
        n_rows: pictures.
        folder: for rows, pictures and status.
        actors, batch_size: of the run.
        row: options of each row, beside ``ROW``.

    Returns:
        What happened, JSON-serialisable.

    Raises:
        RuntimeError: the run ended before it could be killed, or pictures are missing, torn or there twice.
    """
    rows, out = folder / "rows.jsonl", folder / "out"
    lines = [{"prompt": f"a photo of a cat {i}", "seed": i, "id": f"row-{i}", **ROW, **row} for i in range(n_rows)]
    rows.write_text("\n".join(map(json.dumps, lines)) + "\n")
    command = [sys.executable, "-W", "ignore", "-m", "engine.cli", "batch", str(rows), "--out", str(out), "--quiet"]
    command += ["--ray", "--actors", str(actors), "--batch-size", str(batch_size)]
    start = time.perf_counter()
    happened: dict[str, Any] = {"rows": n_rows, "actors": actors, "batch_size": batch_size, "row": {**ROW, **row}}
    driver = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        happened["there_when_actor_died"] = _wait_for(n_rows // 4, out, driver)
        os.kill(_actors(driver)[0].pid, signal.SIGKILL)
        happened["there_when_driver_died"] = _wait_for(n_rows // 2, out, driver)
    finally:
        family = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        driver.wait()
        for process in family:  # Ray's own, which outlive their driver for a while
            if process.is_running():
                process.kill()
    happened["torn_files"] = sum(path.name.startswith(".") for path in out.iterdir())
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    if again.returncode:
        raise RuntimeError(f"the second run failed: {again.stderr[-500:]}")
    return happened | _checked(lines, out) | {"seconds": round(time.perf_counter() - start, 1)}


def _wait_for(count: int, out: Path, driver: subprocess.Popen[Any]) -> int:
    """How many pictures are there once there are ``count``."""
    for _ in range(round(_PATIENCE_S / _POLL_S)):
        found = len(list(out.glob("row-*.png")))
        if found >= count:
            return found
        if driver.poll() is not None:
            break
        time.sleep(_POLL_S)
    raise RuntimeError(f"the run must reach {count} pictures before it ends, got {found}")


def _actors(driver: subprocess.Popen[Any]) -> list[psutil.Process]:
    processes = psutil.Process(driver.pid).children(recursive=True)
    found = [process for process in processes if _ACTOR in " ".join(process.cmdline())]
    if not found:
        raise RuntimeError(f"Ray must have an actor with {_ACTOR!r} in its title, got {len(processes)} processes")
    return found


def _checked(lines: list[dict[str, Any]], out: Path) -> dict[str, Any]:
    """Every row has one whole picture with its own seed in it, and the status file its hash."""
    statuses = [json.loads(line) for line in (out / "status.jsonl").read_text().splitlines()]
    keys = [one["key"] for one in statuses]
    wanted = {line["id"] for line in lines}
    if len(keys) != len(wanted) or set(keys) != wanted or {path.stem for path in out.glob("row-*.png")} != wanted:
        raise RuntimeError(f"there must be one picture and status for each of {len(wanted)} rows, got {len(keys)}")
    hashes = {one["key"]: one["sha256"] for one in statuses}
    for line in lines:
        path = out / f"{line['id']}.png"
        with Image.open(path) as picture:
            picture.load()
            seed = json.loads(picture.text["twinstream"])["seed"]  # type: ignore[attr-defined]
        if seed != line["seed"] or hashlib.sha256(path.read_bytes()).hexdigest() != hashes[line["id"]]:
            raise RuntimeError(f"{path} must be the picture of its row")
    return {
        "second_run": dict(Counter(one["status"] for one in statuses)),
        "distinct_pictures": len(set(hashes.values())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--result", type=Path, default=RESULTS / f"ray-{date.today().isoformat()}.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        happened = recover(arguments.rows, Path(folder), arguments.actors)
    print(json.dumps(happened))
    write_result(arguments.result, machine(), {"ray": happened})


if __name__ == "__main__":
    main()
