"""Calibration on a card that is not there: the right contender serves, and whatever goes wrong is survived and told."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine.backends.calibration import calibrate as module
from engine.backends.calibration.calibrate import Calibrated, calibrate, start_process
from engine.backends.calibration.calls import Call
from engine.backends.calibration.child import answer
from engine.backends.calibration.contenders import contenders
from engine.backends.calibration.table import Choice, open_table
from engine.calibrating import calibrate_model
from engine.cli import main
from engine.kernels.product_tiles import CARDS
from engine.models.calls import calls_of
from tests.fake_cuda import Card, FakeCuda
from tests.pipelines import relative_error

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")

_DEVICE = torch.device("cuda:0")
_OURS, _SDPA = "_attention_fwd_kernel", "aten.sdpa"
_OTHERS = {f"aten._scaled_dot_product_{name}_attention": 1e-4 for name in ("cudnn", "flash", "efficient")}


class _Forked:
    """The process that is asked, without the seconds that it takes to import torch."""

    started = 0

    def __init__(self) -> None:
        _Forked.started += 1
        asked, answered = os.pipe(), os.pipe()
        self.pid, self.status = os.fork(), None
        if not self.pid:
            try:
                os.close(asked[1])
                os.close(answered[0])
                torch.set_num_threads(1)
                answer(os.fdopen(asked[0]), os.fdopen(answered[1], "w"))
            finally:
                os._exit(3)
        os.close(asked[0])
        os.close(answered[1])
        self.stdin, self.stdout = os.fdopen(asked[1], "w"), os.fdopen(answered[0])

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("engine.backends.calibration.calibrate.start_process", _Forked)
    monkeypatch.setattr(_Forked, "started", 0)
    monkeypatch.setattr(module, "_CALL_SECONDS", 300.0)  # machines that test are busy
    monkeypatch.setattr(module, "_START_SECONDS", 300.0)
    monkeypatch.setattr("engine.loading.calibrate_model", partial(calibrate_model, seconds=600.0))
    return tmp_path / "cache" / "twinstream"


@pytest.fixture(autouse=True)
def card() -> Iterator[Card]:
    with FakeCuda(seconds={_OURS: 1e-5, _SDPA: 1e-5} | _OTHERS) as card:
        yield card
        assert not card.races, card.races[:3]


def _attention(n: int = 16, rows: int = 2) -> Call:
    tensors = (torch.empty(rows, n, 16, dtype=torch.float32, device="meta") for _ in range(3))
    return Call("attention", (*tensors, 2))


def _add(channels: int = 8) -> Call:
    like = torch.empty(2, channels, 2, 2, device="meta").to(memory_format=torch.channels_last)
    return Call("residual_add", (like, like, torch.empty(channels, device="meta")))


def _product(dtype: torch.dtype) -> Call:
    x, weight, bias = torch.empty(2, 16, 64), torch.empty(64, 64), torch.empty(64)
    return Call("linear_add", tuple(one.to("meta", dtype) for one in (x, weight, bias, x)))


def _few_calls(*asked: Any) -> list[Call]:
    """Some of a model's, by which a test is not long."""
    calls = calls_of(*asked)
    return [call for call in calls if call.op == "group_norm_silu"][:3] + [c for c in calls if c.op == "attention"][:1]


def _calibrate(*calls: Call, **options: Any) -> Calibrated:
    return calibrate("a model", lambda: calls, _DEVICE, **({"progress": False, "seconds": 600.0} | options))


def _choice(done: Calibrated, call: Call) -> Choice:
    return done.table.choices[call.key][call.rows]


@pytest.mark.parametrize(
    ("seconds", "serves", "why"),
    [
        ({_OURS: 5e-6}, "triton", "times as fast as torch"),
        ({_OURS: 2e-5}, "torch", "ours takes 20.0 us"),
        ({}, "torch", "ours takes 10.0 us"),  # but for a copy that torch's makes: no margin
        ({_OURS: 9.9e-6, _SDPA: 9e-6}, "torch", "ours takes"),
        ({"aten._scaled_dot_product_flash_attention": 4e-6}, "flash", "times as fast as torch"),
        ({_OURS: 4.9e-6, "aten._scaled_dot_product_flash_attention": 4e-6}, "flash", "1.0 times as fast as triton"),
        ({_OURS: 3e-6, "aten._scaled_dot_product_flash_attention": 4e-6}, "triton", "times as fast as flash"),
    ],
)
def test_the_fastest_serves_and_ties_are_torchs(card: Card, seconds: dict, serves: str, why: str) -> None:
    card.seconds |= {_SDPA: 9e-6} | seconds
    choice = _choice(_calibrate(_attention()), _attention())
    assert choice.serves == serves
    assert why.replace("1.0 times", "times") in choice.why
    assert choice.wrong == {}


def test_both_forms_of_a_product_compete_on_hopper_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    call = _product(torch.float16)
    assert set(contenders(call)) == {"torch", "triton", "triton, pointers"}
    assert set(contenders(_product(torch.float32))) == {"torch", "triton"}
    choice = _choice(_calibrate(call), call)
    assert choice.wrong == {}
    assert choice.serves == "triton"  # one kernel, where torch's are two
    monkeypatch.setattr("engine.backends.calibration.contenders.card_of", lambda _: CARDS[89])
    assert set(contenders(call)) == {"torch", "triton"}


@pytest.mark.parametrize(
    ("alone", "shared", "serves"),
    [(1e-5, 1e-8, "triton, two launches"), (1e-8, 1e-5, "triton"), (1e-3, 1e-3, "torch")],
)
def test_both_ways_of_a_group_norm_are_timed(card: Card, alone: float, shared: float, serves: str) -> None:
    card.seconds |= {"_group_norm_kernel": alone}
    card.seconds |= {f"_group_norm_{name}_kernel": shared for name in ("stats", "apply")}
    x = torch.empty(2, 4, 32, 32, device="meta").to(memory_format=torch.channels_last)
    call = Call("group_norm_silu", (x, None, *torch.empty(2, 4, device="meta"), 2, 1e-5))
    choice = _choice(_calibrate(call), call)
    assert choice.serves == serves
    assert choice.wrong == {}
    if serves == "torch":
        assert "ours takes 1000.0 us" in choice.why


def test_a_split_that_is_wrong_does_not_keep_what_is_not_split_from_serving(card: Card) -> None:
    card.seconds |= {_OURS: 1e-6, _SDPA: 1e-4}
    card.faults["_attention_combine_kernel"] = "wrong"
    call = _attention(96)
    choice = _choice(_calibrate(call), call)
    assert choice.serves == "triton"
    assert "its error is" in choice.wrong["triton, keys split"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("wrong", "its error is"),
        ("nan", "its result has NaN"),
        ("fickle", "it gives other bits the second time"),
        ("outside", "it writes outside of its tensors"),
        ("fail", "an illegal memory access"),
        ("hang", "it took too long"),
        ("die", "the process ended with -9"),
    ],
)
def test_what_goes_wrong_is_survived_and_told(
    card: Card, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str
) -> None:
    if fault == "hang":
        monkeypatch.setattr(module, "_CALL_SECONDS", 5.0)  # on a busy machine, which calls of others need
    card.seconds[_OURS] = 1e-7
    card.faults[_OURS] = fault
    done = _calibrate(_attention(), _add())
    choice = _choice(done, _attention())
    assert choice.serves == "torch"
    assert reason in choice.wrong.get("triton", choice.why)
    assert reason in choice.why
    assert _choice(done, _add()).wrong == {}
    assert (_Forked.started > 1) == (fault in ("fail", "hang", "die"))


def test_torchs_own_trouble_is_told_too() -> None:
    shapeless = Call("residual_add", (*_add().arguments[:2], torch.empty(3, device="meta")))
    choice = _choice(_calibrate(shapeless), shapeless)
    assert choice.serves == "torch"
    assert "nothing could be proven" in choice.why


def test_what_is_known_is_not_asked_again(cache: Path) -> None:
    first = _calibrate(_attention(), _add())
    assert (first.asked, first.left, _Forked.started) == (2, 0, 1)
    (file,) = cache.iterdir()
    found = json.loads(file.read_text())
    assert found["about"]["card"] == "Imaginary 9000"
    assert {"driver", "torch", "triton", "cudnn", "flags", "kernels", "multiprocessors"} <= found["about"].keys()
    module_table = open_table(_DEVICE)
    assert _calibrate(_attention()).asked == 0
    assert calibrate("another", lambda: [_attention()], _DEVICE, progress=False).asked == 0
    assert calibrate("a third", lambda: [_attention(), _attention(32)], _DEVICE, progress=False).asked == 1
    assert _Forked.started == 2
    assert calibrate("a third", lambda: pytest.fail("asked what it calls"), _DEVICE, progress=False).asked == 0
    assert _calibrate(_attention(), again=True).asked == 1
    assert module_table.about == found["about"]


def test_a_table_is_for_one_card_and_what_runs_on_it(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    _calibrate(_attention())
    monkeypatch.setattr(torch.version, "cuda", "99.9")
    assert _calibrate(_attention()).asked == 1
    monkeypatch.setattr("engine.backends.calibration.table._kernels_digest", lambda: "others")
    assert _calibrate(_attention()).asked == 1
    assert len(list(cache.iterdir())) == 3


def test_two_processes_keep_what_the_other_found(monkeypatch: pytest.MonkeyPatch) -> None:
    done = _calibrate(_attention())
    monkeypatch.setattr("engine.backends.calibration.table._KEPT", {})
    other = open_table(_DEVICE)
    other.put(_add().key, 2, Choice("torch", "said so"))
    other.save()
    done.table.save()
    monkeypatch.setattr("engine.backends.calibration.table._KEPT", {})
    assert _attention() in open_table(_DEVICE)
    assert _add() in open_table(_DEVICE)


def test_when_the_time_is_over_the_rest_is_left(card: Card) -> None:
    assert _calibrate(_attention(), seconds=0.0).left == 1
    assert _attention() not in open_table(_DEVICE)
    card.faults[_OURS] = "hang"
    start = time.perf_counter()
    done = _calibrate(_add(), _attention(), _add(16), seconds=3.0)
    assert time.perf_counter() - start < 6
    assert done.left >= 2
    assert _attention() not in open_table(_DEVICE)  # it may be right, and only late
    card.faults.clear()
    assert _calibrate(_add(), _attention(), _add(16)).asked == done.left


def test_a_home_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="calibrated again in the next process"):
        assert _calibrate(_attention()).asked == 1
    assert _calibrate(_attention()).asked == 0  # this process knows


def test_a_damaged_file(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    _calibrate(_attention())
    monkeypatch.setattr("engine.backends.calibration.table._KEPT", {})
    (file,) = cache.iterdir()
    file.write_text(file.read_text()[:-20])
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        assert _calibrate(_attention()).asked == 1
    monkeypatch.setattr("engine.backends.calibration.table._KEPT", {})
    assert _attention() in open_table(_DEVICE)


def test_a_process_that_always_ends_is_given_up(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_ENDS", 2)
    card.faults |= {_OURS: "die", "_residual_add_fwd_kernel": "die"}
    with pytest.warns(RuntimeWarning, match="2 processes ended"):
        done = _calibrate(_attention(), _add(), _add(16))
    assert (done.asked, done.left) == (1, 2)


def test_the_real_process_without_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is started, whatever lies in the current folder, reads what it is told, and ends since there is no card."""
    if sys.version_info >= (3, 11):  # before it, Python has no way to leave the current folder out
        (tmp_path / "engine.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    with pytest.warns(RuntimeWarning, match="did not start: the process ended with 1"):
        assert _calibrate(_attention(), start=start_process, seconds=300.0).left == 1


def test_no_process_at_all() -> None:
    def refuse() -> Any:
        raise OSError("no such file")

    with pytest.warns(RuntimeWarning, match="no process could be started: no such file"):
        assert _calibrate(_attention(), start=refuse).left == 1


def test_auto_serves_by_the_table_through_graphs(
    small_folder: Path, card: Card, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("engine.calibrating.calls_of", _few_calls)
    card.seconds |= {"_group_norm_kernel": 1e-8, _OURS: 1.0}
    arguments = {"prompt": "a cat", "steps": 2, "seed": 0, "output": "latent", "progress": False}
    exact = engine.load(small_folder, device="cpu", backend="torch").generate(**arguments).latents
    sd = engine.load(small_folder, device="cuda:0", dtype="float32")
    card.launches.clear()
    out = sd.generate(**arguments)
    assert relative_error(out.latents.cpu(), exact) < 1e-4
    kernels = card.kernels()
    assert kernels["_group_norm_kernel"] > 0
    assert kernels[_OURS] == 0
    assert card.replays > 0
    assert out.settings["backend"] == "calibrated"
    assert out.settings["graphs"] == "replayed"
    assert out.settings["ops"]["group_norm_silu"].startswith("calibrated: triton at ")
    assert "torch" in out.settings["ops"]["attention"]
    started = _Forked.started
    assert main(["info", "--model", str(small_folder), "--device", "cuda:0", "--dtype", "float32"]) == 0
    assert "group_norm_silu   calibrated: triton at " in capsys.readouterr().out
    assert _Forked.started == started  # all is known


def test_without_calibration_torchs_own_serves(small_folder: Path, card: Card) -> None:
    sd = engine.load(small_folder, device="cuda:0", dtype="float32", calibrate=False)
    out = sd.generate("a cat", steps=1, seed=0, output="latent", progress=False)
    assert _Forked.started == 0
    assert card.kernels() == {}
    assert card.replays > 0
    assert out.settings["ops"]["attention"] == "calibrated: torch, not calibrated"
    with pytest.raises(ValueError, match="calibrate must be True or False, got 'no'"):
        engine.load(small_folder, calibrate="no")


def test_the_command(small_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("engine.calibrating.calls_of", _few_calls)
    command = ["calibrate", "--model", str(small_folder), "--device", "cuda:0", "--dtype", "float32", "--quiet"]
    assert main([*command, "--latents", "4", "4", "--images", "1"]) == 0
    printed = capsys.readouterr().out
    assert "attention float32 16x24" in printed
    assert "0 calls" not in printed
    assert main([*command, "--latents", "4", "4", "--images", "1"]) == 0
    assert "  0 calls in " in capsys.readouterr().out
    assert main([*command, "--images", "0"]) == 1
    assert "images must be an integer >= 1, got 0" in capsys.readouterr().err


def test_the_command_needs_a_card(small_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--model", str(small_folder), "--device", "cpu"]) == 1
    assert "calibration needs a CUDA device, got cpu" in capsys.readouterr().err
