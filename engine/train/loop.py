"""The training loop that all objectives share: accumulation, checkpoints, samples, and a clean way out.

A step's random numbers depend on the seed and the step alone, so a checkpoint needs no generator states: a run that
was killed and continued is the uninterrupted run to the bit.
"""

from __future__ import annotations

import io
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import NonFiniteError
from ..files import write_atomically
from .options import TrainOptions

_CHECKPOINT = "checkpoint.pt"


class Objective(Protocol):
    """What is trained."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """By name; float32."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything that decides the run's outcome, JSON-serialisable."""
        ...

    def optimizer(self) -> torch.optim.Optimizer: ...

    def loss(self, part: int) -> Tensor:
        """The mean loss of one micro-batch; ``part`` counts them from the start of the run."""
        ...

    def sample(self) -> Image.Image:
        """A sheet of pictures with the parameters as they are."""
        ...


class Terminated(SystemExit):
    """SIGTERM came; the checkpoint is written. The exit status is the shell's for this signal."""


def run(objective: Objective, options: TrainOptions) -> int:
    """Train, going on from the folder's checkpoint if there is one; returns how many steps were taken in all.

    Raises:
        ValueError: the folder's checkpoint belongs to other settings or pictures, or has more steps than asked for.
        NonFiniteError: the loss or a gradient became NaN or infinite; the step was not taken.
        Terminated: on SIGTERM, after the running step.
    """
    optimizer, folder = objective.optimizer(), None if options.folder is None else Path(options.folder)
    first = 0
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        first = _resume(folder / _CHECKPOINT, objective, optimizer, options.steps)
    with _sigterm() as terminated, _log(folder, first) as log:
        bar = tqdm(total=options.steps, initial=first, disable=not options.progress, unit="step")
        with bar:
            for step in range(first, options.steps):
                loss = _step(objective, optimizer, step, options.accumulation_steps)
                if not math.isfinite(loss):
                    raise NonFiniteError(_last_good(step, folder))
                bar.set_postfix(loss=f"{loss:.4f}")
                bar.update()
                log(step, loss)
                done = step + 1
                stopped = options.callback is not None and options.callback(step, options.steps, loss) is False
                is_last = done == options.steps or stopped or terminated.is_set()
                if folder is not None and (is_last or done % options.checkpoint_every == 0):
                    _save(folder / _CHECKPOINT, objective, optimizer, done)
                if terminated.is_set():
                    raise Terminated(128 + signal.SIGTERM)
                if folder is not None and options.sample_every and (is_last or not done % options.sample_every):
                    objective.sample().save(folder / f"sample-{done:06d}.png")
                if stopped:
                    return done
    return options.steps


def _step(objective: Objective, optimizer: torch.optim.Optimizer, step: int, accumulation_steps: int) -> float:
    """Take a step; its loss, or NaN where loss or gradients are not finite, and then no step is taken."""
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for part in range(step * accumulation_steps, (step + 1) * accumulation_steps):
        loss = objective.loss(part) / accumulation_steps
        loss.backward()
        total += loss.item()
    gradients = [p.grad for p in objective.parameters.values() if p.grad is not None]
    if not math.isfinite(total) or not torch.stack([torch.isfinite(one).all() for one in gradients]).all():
        return math.nan  # a finite loss may have gradients that are not, and one step with them spoils everything
    optimizer.step()
    return total


def _save(path: Path, objective: Objective, optimizer: torch.optim.Optimizer, step: int) -> None:
    state = {
        "step": step,
        "settings": json.dumps(dict(objective.settings), sort_keys=True),
        "parameters": {name: parameter.detach() for name, parameter in objective.parameters.items()},
        "optimizer": optimizer.state_dict(),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


@torch.no_grad()
def _resume(path: Path, objective: Objective, optimizer: torch.optim.Optimizer, steps: int) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    then, now = json.loads(state["settings"]), json.loads(json.dumps(dict(objective.settings)))
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            rule = f"{path} was written with {name}={then.get(name)!r}"
            raise ValueError(f"{rule}; to go on, ask for the same, or give another folder, got {now.get(name)!r}")
    if state["step"] > steps:
        rule = f"steps must be at least the {state['step']} that {path} has taken"
        raise ValueError(f"{rule}; ask for as many, or give another folder, got {steps}")
    for name, parameter in objective.parameters.items():
        parameter.copy_(state["parameters"][name])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def _last_good(step: int, folder: Path | None) -> str:
    if folder is None:
        kept = "no folder was given, so nothing is kept"
    elif (folder / _CHECKPOINT).exists():
        kept = f"the last good state is in {folder / _CHECKPOINT}"
    else:
        kept = f"no checkpoint had been written to {folder} yet, so nothing is kept"
    return (
        f"the training loss or its gradients became NaN or infinite at step {step}; {kept}. Try a smaller learning_rate"
    )


@contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; outside the main thread, where signals cannot be caught, one that nothing sets."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _log(folder: Path | None, first: int) -> Iterator[Callable[[int, float], None]]:
    """A log of losses: ``log.jsonl`` in the folder, and TensorBoard's where that is installed.

    Steps from ``first`` on, which a run that died after its last checkpoint has logged, are about to be taken again
    and are cut off.
    """
    if folder is None:
        yield lambda step, loss: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        board = None
    else:
        board = SummaryWriter(str(folder), purge_step=first)
    _cut_log(folder / "log.jsonl", first)
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:

        def log(step: int, loss: float) -> None:
            file.write(json.dumps({"step": step, "loss": round(loss, 6)}) + "\n")
            file.flush()
            if board is not None:
                board.add_scalar("loss", loss, step)

        yield log
    if board is not None:
        board.close()


def _cut_log(path: Path, first: int) -> None:
    """Keep what was logged before step ``first``; a last line that a crash cut short goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] >= first:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(f"{line}\n")
    write_atomically(path, "".join(kept).encode())
