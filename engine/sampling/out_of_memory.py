"""When memory runs out: refuse what cannot fit, free what can be rebuilt, try once more, say what would fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from ..backends.graphs import empty_cache
from ..errors import OutOfMemoryError
from ..methods.control import Control
from ..models.tiny_vae import VAE
from ..models.unet import UNet2DConditionModel, UNetEncoder
from .arguments import Options

T = TypeVar("T")

_CGROUP = Path("/sys/fs/cgroup")
_WIDEST = 4  # of a step's memory on a CPU, in skip connections
_BYTES_OF_PIXELS = 3 * (4 + 4)  # a picture in float32, as decoded and as copied to the host


def check_memory(
    unet: UNet2DConditionModel, vae: VAE, n_images: int, height: int, width: int, options: Options
) -> None:
    """Raise ``OutOfMemoryError`` where the least that a request needs exceeds what the memory holds now.

    A bound from below, so that nothing is refused that fits: the skip connections of one row per image, and as many
    again for what each ControlNet adds to them; what the VAE's last level holds at once, of all pictures, or of one
    where it runs picture by picture (a GPU falls back to that by itself); and the pictures.
    """
    device = unet.conv_in.weight.device
    available = available_bytes(device)
    if available is None:
        return
    pixels = height * width
    one_at_a_time = options.vae_slicing or device.type == "cuda"
    runs_vae = not options.vae_tiling and (options.output != "latent" or options.image is not None)
    decoded = (1 if one_at_a_time else n_images) * pixels * _vae_bytes_per_pixel(vae) if runs_vae else 0
    nets = [one for one in options.control if one.weight]
    per_position = _unet_bytes_per_position(unet) + _nets_bytes_per_position(nets)
    step = n_images * pixels // vae.config.factor**2 * per_position
    needed = max(step, decoded) + n_images * pixels * _BYTES_OF_PIXELS
    if needed > available:
        rule = f"the memory of {device} must hold all images drawn at once"
        asked = f"{n_images} of {height}x{width}{_with_nets(len(nets))}"
        found = f"{asked}: at least {needed / 1e9:.3g} GB, with {available / 1e9:.3g} GB free"
        advice = "draw fewer or smaller ones" if decoded <= step or one_at_a_time else "try vae_slicing=True"
        raise OutOfMemoryError(f"{rule}, got {found}; {advice}")


def available_bytes(device: torch.device) -> int | None:
    """What a device's memory still holds; None where nothing says so."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    found = [_cgroup_bytes(), _meminfo_bytes()]
    return min((n for n in found if n is not None), default=None)


def _meminfo_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup_bytes() -> int | None:
    """What this process' control group may still take."""
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - used


def _nets_bytes_per_position(controls: Sequence[Control]) -> int:
    """Of what ControlNets that act at one time add to the skip connections, per latent position."""
    own = [(one, 0 if one.net.control.is_pooled else _unet_bytes_per_position(one.net)) for one in controls]
    always = sum(n for one, n in own if (one.start, one.end) == (0, 1))
    return always + max((n for one, n in own if (one.start, one.end) != (0, 1)), default=0)


def _with_nets(n_nets: int) -> str:
    return f" with {n_nets} ControlNet{'s' if n_nets > 1 else ''}" if n_nets else ""


def _unet_bytes_per_position(unet: UNetEncoder) -> int:
    """Of the skip connections, all of which a step holds at once, per latent position."""
    config, weight = unet.config, unet.conv_in.weight
    channels = float(config.block_out_channels[0])
    for level, width in enumerate(config.block_out_channels):
        channels += config.layers_per_block * width / 4**level
    return int(channels) * weight.element_size()


def _vae_bytes_per_pixel(vae: VAE) -> int:
    """Of a resnet's input and output at full size."""
    return 2 * vae.config.block_out_channels[0] * vae.weight.element_size()


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
    empty_cache()
    torch.cuda.reset_peak_memory_stats(like.device)
    before = torch.cuda.memory_allocated(like.device)
    try:
        unet(sample, 0, context)
    except torch.OutOfMemoryError:
        return 0
    taken = torch.cuda.max_memory_allocated(like.device) - before
    empty_cache()
    return torch.cuda.mem_get_info(like.device)[0] // max(1, taken)


def batch_rows(unet: UNet2DConditionModel, vae: VAE, height: int, width: int) -> int | None:
    """How many rows of latents (4, height, width) steps may have beside a decoding picture; None where nothing says.

    On a GPU by what one row takes. Elsewhere by the skip connections, and as much again for each of what the widest
    layers hold at once: their input, both halves of GEGLU, and its product.
    """
    device, positions = unet.conv_in.weight.device, height * width
    if device.type == "cuda":
        return rows_that_fit(unet, height, width)
    available = available_bytes(device)
    if available is None:
        return None
    left = available - 2 * positions * vae.config.factor**2 * _vae_bytes_per_pixel(vae)
    return max(0, left) // (_WIDEST * positions * _unet_bytes_per_position(unet))


def out_of_memory(
    unet: UNet2DConditionModel, factor: int, n_images: int, n_rows: int, size: tuple[int, int], n_net_rows: int = 0
) -> OutOfMemoryError:
    """The error for so many images of ``size`` (height, width) in so many rows, which says how many would fit.

    A row of a ControlNet is counted as one of the UNet.
    """
    height, width = size
    n_fit = rows_that_fit(unet, height // factor, width // factor) * n_images // (n_rows + n_net_rows)
    advice = f"about {n_fit} of that size would fit" if n_fit else "not even one of that size fits"
    asked = f"{n_images} of {height}x{width} in {n_rows} UNet rows"
    asked += f" and {n_net_rows} ControlNet rows" if n_net_rows else ""
    rule = f"the memory of {unet.conv_in.weight.device} must hold all images drawn at once"
    return OutOfMemoryError(f"{rule}, got {asked}; {advice}")
