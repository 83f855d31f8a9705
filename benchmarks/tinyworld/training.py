"""What the pre-training scripts share: a moving average of the weights, a time-based schedule, checkpoints, a log."""

import json
import math
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn


class EMA:
    """Exponential moving average of a module's parameters, with a warm-up of its decay."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.shadow = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in module.state_dict().items():
            self.shadow[name].lerp_(value, 1 - decay)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Lend the averaged weights to ``module`` for the length of a block."""
        own = {name: value.clone() for name, value in module.state_dict().items()}
        module.load_state_dict(self.shadow)
        try:
            yield
        finally:
            module.load_state_dict(own)


class Optimizer:
    """Muon (Jordan et al. 2024) for the matrices and convolution filters of a module, AdamW for everything else.

    A filter of shape (out, in, height, width) is one matrix of ``out`` rows. Muon's steps are scaled to AdamW's mean
    size, so that one learning rate serves both. Embeddings and tensors of one row or column stay with AdamW.
    """

    def __init__(self, module: nn.Module, weight_decay: float) -> None:
        embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self._filters, others = [], []
        for p in self.parameters:
            is_matrix = p.ndim >= 2 and min(p.flatten(1).shape) > 4 and id(p) not in embeddings
            (self._filters if is_matrix else others).append(p)
        self._matrices = [nn.Parameter(p.detach().flatten(1)) for p in self._filters]
        self.parts = (
            torch.optim.Muon(self._matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True),
        )

    def step(self, rate: float) -> None:
        """Clip the gradients to a norm of 1, take one step with learning rate ``rate``, drop the gradients."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for matrix, filters in zip(self._matrices, self._filters, strict=True):
            matrix.grad = None if filters.grad is None else filters.grad.flatten(1)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
        for p in self.parameters:
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.parts[0].state_dict(), "adamw": self.parts[1].state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.parts[0].load_state_dict(state["muon"])
        self.parts[1].load_state_dict(state["adamw"])


class Run:
    """One training run that may be stopped and continued: step count, seconds spent, checkpoint and log.

    The learning rate follows the share of ``minutes`` spent so far: a linear warm-up over the first hundredth, then
    half a cosine down to a hundredth of the peak.
    """

    def __init__(self, folder: Path, name: str, minutes: float, parts: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.log_path = folder / f"{name}.pt", folder / f"{name}.jsonl"
        self.minutes, self.parts = minutes, parts
        self.step, self.samples, self.seconds = 0, 0, 0.0
        self._clock = self._saved = time.monotonic()
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            for part_name, part in parts.items():
                _restore(part, state[part_name])
            self.step, self.samples, self.seconds = state["step"], state["samples"], state["seconds"]
            print(f"continuing {self.path} at step {self.step}, {self.seconds / 60:.1f} min", flush=True)

    def rate(self, peak: float) -> float:
        """The learning rate now."""
        share = min(self.seconds / (60 * self.minutes), 1.0)
        return peak * min(share / 0.01 + 0.02, 1.0) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))

    def advance(self, samples: int, save_every_seconds: float = 120.0) -> bool:
        """Count one step; returns whether it is time to evaluate (a checkpoint was just written)."""
        now = time.monotonic()
        self.seconds += now - self._clock
        self._clock = now
        self.step += 1
        self.samples += samples
        if now - self._saved < save_every_seconds and not self.finished:
            return False
        self.save()
        self._saved = now
        return True

    @property
    def finished(self) -> bool:
        return self.seconds >= 60 * self.minutes

    def save(self) -> None:
        """Write the checkpoint through a temporary file, so that a kill leaves the old one whole."""
        state = {name: _state(part) for name, part in self.parts.items()}
        state |= {"step": self.step, "samples": self.samples, "seconds": self.seconds, "made": _made()}
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.path)

    def log(self, **values: float) -> None:
        """Append one record to the log and print it."""
        record = {"step": self.step, "samples": self.samples, "minutes": round(self.seconds / 60, 2)}
        record |= {name: round(value, 5) for name, value in values.items()}
        with self.log_path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(record, flush=True)


def _made() -> dict[str, str | int]:
    """Where this run is running."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {"commit": commit, "device": f"cpu, {torch.get_num_threads()} threads", "torch": str(torch.__version__)}


def _state(part: Any) -> Any:
    return {"shadow": part.shadow, "updates": part.updates} if isinstance(part, EMA) else part.state_dict()


def _restore(part: Any, state: Any) -> None:
    if isinstance(part, EMA):
        part.shadow, part.updates = state["shadow"], state["updates"]
    else:
        part.load_state_dict(state)
