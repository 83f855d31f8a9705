"""The arguments that both trainers share, each declared once: default, help and check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..checks import check_callable, check_flag, check_integer, check_number, check_texts
from ..options import check_options, option

Callback = Callable[[int, int, float], bool | None]  # step, total, loss -> False ends the training


def _check_path(name: str, value: Any) -> Path:
    if not isinstance(value, str | Path):
        raise ValueError(f"{name} must be a path, got {value!r}")
    return Path(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """How a concept is learned. A method's own options, and its defaults, are in its subclass."""

    steps: int = option(500, "optimiser steps of the whole run.", partial(check_integer, low=1), flags=())
    learning_rate: float = option(0.01, "of AdamW, without weight decay.", partial(check_number, low=0.0), flags=())
    batch_size: int = option(4, "pictures per micro-batch.", partial(check_integer, low=1), flags=())
    accumulation_steps: int = option(1, "micro-batches per step.", partial(check_integer, low=1), flags=())
    masks: str | Path | Sequence[Any] | None = option(
        None,
        "a greyscale picture per reference picture, in a folder by the same stem or in a list; the loss is the mean "
        "over what they mark.",
        flags=(),
        metavar="FOLDER",
    )
    size: int | None = option(
        None,
        "training resolution in pixels; the model's own where not given.",
        partial(check_integer, low=1),
        optional=True,
        flags=(),
        metavar="PIXELS",
    )
    seed: int = option(0, "of everything random.", partial(check_integer, low=0), flags=())
    gradient_checkpointing: bool = option(
        False,
        "recompute activations in the backward pass; slower, in a fraction of the memory.",
        check_flag,
        flags=(),
    )
    folder: str | Path | None = option(
        None,
        "where checkpoint, log (also TensorBoard's, if it is installed) and sample sheets go; a run that was stopped "
        "goes on from there.",
        _check_path,
        optional=True,
        flags=(),
    )
    checkpoint_every: int = option(
        100, "steps between checkpoints.", partial(check_integer, low=1), flags=(), metavar="STEPS"
    )
    sample_every: int = option(
        100, "steps between sample sheets; 0 for none.", partial(check_integer, low=0), flags=(), metavar="STEPS"
    )
    sample_prompts: Sequence[str] | None = option(
        None, "prompts of the sample sheets, the model's own pictures above the concept's.", check_texts, optional=True
    )
    callback: Callback | None = option(
        None,
        "callback(step, total, loss) after every step, counted from 0; returning False ends the training.",
        check_callable,
        optional=True,
    )
    progress: bool = option(True, "show a progress bar.", check_flag)

    def __post_init__(self) -> None:
        check_options(self)
        if self.folder is None and self.sample_prompts is not None:
            raise ValueError("sample_prompts needs a folder for the sheets; give folder too")

    def recorded(self, *own: str) -> dict[str, Any]:
        """The options that decide a run's outcome, and a method's own ones, JSON-serialisable."""
        names = ("learning_rate", "batch_size", "accumulation_steps", "seed", *own)
        return {name: getattr(self, name) for name in names}
