"""Latents to pictures in the form that a request asks for."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from .arguments import Options
from .loop import Denoising
from .request import Request
from .vae_runner import VAERunner


def to_pictures(vae: VAERunner, options: Options, x: Tensor) -> Any:
    """Pictures of latents (B, 4, h, w): PIL ones, an array (B, H, W, 3) float32 in [0, 1], or the latents."""
    if options.output == "latent":
        return x
    decoded = vae.decode(x / vae.vae.config.scaling_factor, options.vae_slicing, options.vae_tiling)
    pixels = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
    if options.output == "numpy":
        return pixels
    return [Image.fromarray((picture * 255).round().astype(np.uint8)) for picture in pixels]


def finished_pictures(vae: VAERunner, request: Request, denoising: Denoising) -> Any:
    """The pictures of a request, as it returns them."""
    drawn = to_pictures(vae, request.options, denoising.pictures)
    if request.masked is None or not request.masked.crops:
        return drawn
    return [request.masked.finished(i, picture) for i, picture in enumerate(drawn)]


def foundation_pictures(vae: VAERunner, request: Request, denoising: Denoising) -> list[Any] | None:
    """The picture of each image's foundation, None where it has none; each trajectory is decoded once."""
    plan, x = denoising.plan, denoising.x
    distinct = [trajectory for trajectory in dict.fromkeys(plan.foundations) if trajectory is not None]
    if not distinct:
        return None
    pictures = dict(zip(distinct, to_pictures(vae, request.options, x[distinct]), strict=True))
    drawn = [None if trajectory is None else pictures[trajectory] for trajectory in plan.foundations]
    if request.masked is None:
        return drawn
    return [None if one is None else request.masked.finished(i, one) for i, one in enumerate(drawn)]
