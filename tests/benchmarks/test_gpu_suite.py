"""The GPU suite is ready: it runs from end to end on the embedded model, and its groups are what the runner runs."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import run
from benchmarks.run import _GROUPS, Group
from benchmarks.systems import twinstream_auto
from benchmarks.test_gpu_calibration import calibration_record
from tests.fake_cuda import FakeCuda

_CASES = {  # what the suite promises, by the system's name
    "twinstream": {
        "guided_step",
        "infusion_parallel_1",
        "infusion_shared",
        "infusion_parallel_8_per_concept",
        "dci_average",
        "vae_decode",
        "cold_start",
        "concept_switch",
    },
    "twinstream_auto": {"guided_step", "infusion_parallel_1", "vae_decode"},
    "diffusers_eager": {"guided_step", "infusion_parallel_1", "dci_average", "vae_decode", "cold_start"},
}


def test_every_case_runs(tmp_path: Path) -> None:
    kept = tmp_path / "records"
    steps = "(test_steps and not guided) or (guided and bfloat16)"
    chosen = f"{steps} or decoded or another or test_start or ceilings or residual_add_1280"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks/test_gpu.py",
        "-q",
        "--try-out",
        f"--records={kept}",
        "-k",
        chosen,
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-3000:]
    records = [json.loads(line) for line in kept.read_text().splitlines()]
    fields = {"case", "system", "dtype", "rows", "median_ms", "p10_ms", "p90_ms", "rel_error", "peak_memory_bytes"}
    assert all(fields <= record.keys() for record in records)
    for system, cases in _CASES.items():
        assert cases <= {record["case"] for record in records if record["system"] == system}


def test_groups_are_all_of_the_suite_and_take_ten_minutes() -> None:
    files = sorted(Path(run.__file__).parent.glob("test_gpu*.py"))
    source = "\n".join(file.read_text() for file in files)
    tests = [line.split("(")[0].removeprefix("def ") for line in source.splitlines() if line.startswith("def test_")]
    prefixes = [group.arguments[-1] for group in _GROUPS["gpu"]]
    assert all(sum(test.startswith(prefix) for prefix in prefixes) == 1 for test in tests)
    assert sum(group.limit_s or 0 for group in _GROUPS["gpu"]) <= 570  # and 30 to write the model
    assert {group.arguments[0] for group in _GROUPS["gpu"]} == {f"benchmarks/{file.name}" for file in files}
    assert _GROUPS["gpu"][0].name == "calibration"  # by which "auto" is timed


class _Agreeing:
    """A process that is asked what serves, and says at once that ours does."""

    def __init__(self) -> None:
        asked, answered = os.pipe(), os.pipe()
        self.stdin, self.stdout = os.fdopen(asked[1], "w"), os.fdopen(answered[0])
        self.thread = threading.Thread(target=self._answer, args=(os.fdopen(asked[0]), os.fdopen(answered[1], "w")))
        self.thread.start()

    @staticmethod
    def _answer(read: Any, write: Any) -> None:
        with read, write:
            for i, _ in enumerate(read):
                serves = {"serves": "triton", "why": "twice as fast", "wrong": {"flash": "it errs"}}
                write.write(json.dumps(serves if i else {"ready": True}) + "\n")
                write.flush()

    def kill(self) -> None:
        self.stdin.close()

    def wait(self) -> int:
        self.thread.join()
        return 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_the_suite_begins_with_calibration(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("engine.backends.calibration.calibrate.start_process", _Agreeing)
    with FakeCuda():
        record = calibration_record(small_folder, torch.device("cuda:0"))
        auto = twinstream_auto(small_folder, torch.float16, "cuda:0")
    assert auto.name == "twinstream_auto"
    assert record["calls"] == len(record["chosen"]) > 20
    assert (record["left"], record["case"], record["system"]) == (0, "calibration", "twinstream")
    assert record["median_ms"] == record["p90_ms"] > 0
    first = record["chosen"][0]
    assert (first["serves"], first["why"], first["wrong"]) == ("triton", "twice as fast", {"flash": "it errs"})
    assert f"triton    {first['call']}, {first['rows']} rows: twice as fast" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["run", "--gpu"])
    assert run.main() == 1
    assert "needs a CUDA device, and torch sees none: nothing was measured" in capsys.readouterr().err


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"device": "cpu", "cpu": "Some CPU", "cpu_flags": "X", "date": "2026-01-01", "commit": "abc"}
    monkeypatch.setattr(run, "machine", lambda _device: dict(about))
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "_GROUPS", {"cpu": (Group("a", ()), Group("b", ()))})
    monkeypatch.setattr(sys, "argv", ["run"])
    ran: list[str] = []

    def record(group: Group) -> tuple[list[dict], bool]:
        ran.append(group.name)
        return [{"group": group.name, "case": f"{group.name}{len(ran)}"}], group.name == "a" or len(ran) > 2

    monkeypatch.setattr(run, "_run", record)
    assert run.main() == 1  # b fails, and what it measured is kept
    path = tmp_path / "some-cpu-x-2026-01-01.json"
    found = json.loads(path.read_text())
    assert (found["groups"], [one["case"] for one in found["records"]]) == (["a"], ["a1", "b2"])
    assert run.main() == 0
    found = json.loads(path.read_text())
    assert (ran, [one["case"] for one in found["records"]]) == (["a", "b", "b"], ["a1", "b3"])
    about["commit"] = "def"
    run.main()
    assert ran == ["a", "b", "b", "a", "b"]  # another commit begins anew
