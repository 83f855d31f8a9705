"""Calibration for a model: what its networks call, asked of the card; see ``backends/calibration``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from .backends.calibration.calibrate import SECONDS, Calibrated, calibrate
from .models.calls import calls_of
from .weights.checkpoint import Checkpoint

_IMAGES = (1, 4)  # pictures at a time


def calibrate_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    *,
    size: tuple[int, int] | None = None,
    images: Sequence[int] = _IMAGES,
    seconds: float = SECONDS,
    again: bool = False,
    progress: bool = True,
) -> Calibrated:
    """Find out what serves a model's operations on a card.

    Args:
        checkpoint: the model.
        device, dtype: the card, and of the weights.
        size: height and width of latents; the model's own unless given.
        images: how many pictures are drawn at a time.
        seconds, again, progress: as of ``calibrate``.
    """
    length = checkpoint.text_config.get("max_position_embeddings", 77)
    asked = (checkpoint.unet_config, checkpoint.vae_config, dtype, length, size, tuple(images))
    digest = hashlib.sha256(repr(asked).encode())
    for file in sorted((Path(__file__).parent / "models").glob("*.py")):  # which make the calls
        digest.update(file.read_bytes())
    name = digest.hexdigest()[:16]
    return calibrate(name, lambda: calls_of(*asked), device, seconds, again, progress)
