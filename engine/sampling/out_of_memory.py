"""What to do when a GPU's memory runs out: free what can be rebuilt, try once more, and say what would fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from ..errors import OutOfMemoryError
from ..models.unet import UNet2DConditionModel

T = TypeVar("T")


def with_retry(run: Callable[[], T], free: Callable[[], None], again: Callable[[], T] | None = None) -> T:
    """``run()``; if memory runs out, ``free()`` and then ``again()``, or the same once more."""
    try:
        return run()
    except torch.OutOfMemoryError:
        pass  # freed below, when this attempt's tensors are gone with its traceback
    free()
    return run() if again is None else again()


def rows_that_fit(unet: UNet2DConditionModel, height: int, width: int) -> int:
    """How many rows of latents (4, height, width) a step would hold now, by what one row takes; 0 if not even one."""
    like = unet.conv_in.weight
    sample = torch.zeros(1, unet.config.in_channels, height, width, device=like.device, dtype=like.dtype)
    context = torch.zeros(1, 77, unet.config.cross_attention_dim, device=like.device, dtype=like.dtype)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(like.device)
    before = torch.cuda.memory_allocated(like.device)
    try:
        unet(sample, 0, context)
    except torch.OutOfMemoryError:
        return 0
    taken = torch.cuda.max_memory_allocated(like.device) - before
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(like.device)[0] // max(1, taken)


def out_of_memory(
    unet: UNet2DConditionModel, factor: int, n_images: int, n_rows: int, size: tuple[int, int]
) -> OutOfMemoryError:
    """The error for so many images of ``size`` (height, width) in so many rows, which says how many would fit."""
    height, width = size
    n_fit = rows_that_fit(unet, height // factor, width // factor) * n_images // n_rows
    advice = f"about {n_fit} of that size would fit" if n_fit else "not even one of that size fits"
    asked = f"{n_images} of {height}x{width} in {n_rows} UNet rows"
    rule = f"the memory of {unet.conv_in.weight.device} must hold all images drawn at once"
    return OutOfMemoryError(f"{rule}, got {asked}; {advice}")
