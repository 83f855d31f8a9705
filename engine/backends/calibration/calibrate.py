"""Calibration of a card: the calls that are not known yet are asked of a child process, within a time."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from tqdm import tqdm

from ...warn import warn
from .calls import Call
from .contenders import TORCHS_OWN
from .flags import get_flags
from .table import Choice, Table, open_table

SECONDS = 40.0  # that a load may take longer for it
_CALL_SECONDS = 25.0  # that a call may take: a few compilations of Triton's
_START_SECONDS = 30.0  # that torch and the card may take to be there
_MOST_ENDS = 8  # of child processes, after which the card is left alone


class Process(Protocol):
    """A child process: what it reads, what it writes, and its end."""

    stdin: TextIO
    stdout: TextIO

    def kill(self) -> None: ...

    def wait(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What a calibration did: the table, how many calls it asked, how many it left for the next time, and seconds."""

    table: Table
    asked: int
    left: int
    seconds: float


def start_process() -> Any:
    """A Python that answers calls."""
    package = Path(__file__).parents[3]
    paths = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", "engine.backends.calibration.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1"},  # not what lies in the current folder
    )


def calibrate(
    name: str,
    calls: Callable[[], Iterable[Call]],
    device: torch.device,
    seconds: float = SECONDS,
    again: bool = False,
    progress: bool = True,
    start: Callable[[], Process] | None = None,
) -> Calibrated:
    """Find out which contenders serve calls on a card, and keep it.

    Args:
        name: of the model and sizes that make these calls; where all is known for it, they are not asked for.
        calls: what the model calls; what comes first is asked first.
        device: the card.
        seconds: after which what is left is left, for the next time.
        again: ask what is known, too.
        progress: show a bar.
        start: starts the process that is asked; ``start_process`` unless given.
    """
    begin, table = time.perf_counter(), open_table(device)
    if name in table.models and not again:
        return Calibrated(table, 0, 0, time.perf_counter() - begin)
    missing = [call for call in calls() if again or call not in table]
    end = begin + seconds
    asker, asked = _Asker(device, start or start_process), 0
    try:
        with tqdm(missing, desc="calibrating", unit="call", disable=not progress) as bar:
            for call in bar:
                choice = asker.ask(call, end)
                if choice is None:
                    break
                table.put(call.key, call.rows, choice)
                asked += 1
    finally:
        asker.close()
        if asked == len(missing):
            table.models.add(name)
        if asked or not missing:
            table.save()
    if asker.trouble is not None:
        warn(f"torch's own operations serve where {device} is not calibrated: {asker.trouble}", RuntimeWarning)
    return Calibrated(table, asked, len(missing) - asked, time.perf_counter() - begin)


class _Asker:
    """Asks a child process, and starts another where one has ended."""

    def __init__(self, device: torch.device, start: Callable[[], Process]) -> None:
        self.device, self.start = device, start
        self.trouble: str | None = None  # why it asks no more
        self._child: _Child | None = None
        self._ends = 0

    def ask(self, call: Call, end: float) -> Choice | None:
        """What serves a call; None where the time or the patience is over."""
        wrong: dict[str, str] = {}
        while self._ready(end):
            assert self._child is not None
            trying, reason = TORCHS_OWN, None
            self._child.say(call.to_json() | {"wrong": wrong})
            limit = min(end, time.perf_counter() + _CALL_SECONDS)
            while reason is None:
                line = self._child.hear(limit)
                if "trying" in line:
                    trying = line["trying"]
                elif "serves" in line:
                    return Choice(line["serves"], line["why"], line["wrong"])
                else:
                    reason = line["error"]
                    if line["lost"]:
                        self._end()
            if time.perf_counter() >= end:
                return None  # it may be right, and only late
            wrong[trying] = reason
            if trying == TORCHS_OWN:
                return Choice(TORCHS_OWN, f"nothing could be proven: {reason}", wrong)
        return None

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None

    def _end(self) -> None:
        self.close()
        self._ends += 1

    def _ready(self, end: float) -> bool:
        """Whether there is a child that listens."""
        if self._child is None and self._ends < _MOST_ENDS and time.perf_counter() < end:
            try:
                self._child = _Child(self.start())
            except OSError as error:
                self.trouble, self._ends = f"no process could be started: {error}", _MOST_ENDS
                return False
            self._child.say({"device": str(self.device), "flags": get_flags()})
            line = self._child.hear(min(end, time.perf_counter() + _START_SECONDS))
            if "ready" not in line:
                self.trouble = f"a process with the card did not start: {line['error']}"
                self._end()
                self._ends = _MOST_ENDS
        if self._ends >= _MOST_ENDS:
            self.trouble = self.trouble or f"{self._ends} processes ended"
        return self._child is not None


class _Child:
    """Lines to and from a process."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def say(self, line: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it has ended, as ``hear`` will tell
            self.process.stdin.write(json.dumps(line) + "\n")
            self.process.stdin.flush()

    def hear(self, limit: float) -> dict[str, Any]:
        """The next line; where none comes, an error, and that the process is lost."""
        try:
            line = self._lines.get(timeout=max(0.0, limit - time.perf_counter()))
        except queue.Empty:
            return {"error": "it took too long", "lost": True}
        return json.loads(line) if line else {"error": f"the process ended with {self.process.wait()}", "lost": True}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # what it was not told before it ended
                pipe.close()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")
