"""Inpainting as a step sees it: what it keeps of a picture, and what a UNet with nine input channels is told of it.

A model of four channels is held to the picture from outside (RePaint's known region, Lugmayr et al. 2022,
arXiv:2201.09865, eq. 8, without its resampling): after step ``i``, at the noise level of step ``i + 1``,

    x' = (1 - m) (a x_0 + s n) + m x,

with the mask ``m``, clean latents ``x_0``, the start's own noise ``n``, and ``a``, ``s`` of the sampler's table; after
the last step ``a = 1`` and ``s = 0``. An inpainting model of nine channels sees latents, mask and the latents of the
picture without what is redrawn, in this order, and is left to itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.graphs import changed
from .mask import HALF, Masked
from .table import Coefficients, SamplerTable, over_latents


@dataclass(frozen=True, slots=True)
class Kept:
    """What trajectories keep of their pictures.

    Attributes:
        mask: (B, 1, h, w) float32, 1 where the picture is redrawn, 0 where it is kept.
        clean: (B, 4, h, w) float32 latents of the pictures.
        noise: (B, 4, h, w) float32 unit noise of their starts.
    """

    mask: Tensor
    clean: Tensor
    noise: Tensor


@dataclass(frozen=True, slots=True)
class Inpainting:
    """What a model needs to inpaint; one of both.

    Attributes:
        kept: of a model of four channels.
        told: (B, 5, h, w) float32, mask and latents of the masked pictures, further input of a model of nine channels.
    """

    kept: Kept | None
    told: Tensor | None

    def take(self, entries: Tensor) -> Inpainting:
        """Those of some entries (n,), int64."""
        return changed(self, lambda x: x[entries])

    def tell(self, latents: Tensor) -> Tensor:
        """The UNet's input for scaled latents (B, 4, h, w)."""
        return latents if self.told is None else torch.cat([latents, self.told], dim=1)

    def keep(self, x: Tensor, coefficients: Coefficients, positions: Tensor) -> Tensor:
        """``x`` (B, 4, h, w) after steps ``positions`` (B,), with what is kept of the pictures in its place."""
        if self.kept is None:
            return x
        scale, level = (over_latents(one[positions]) for one in (coefficients.keep_scale, coefficients.keep_noise))
        return (1 - self.kept.mask) * (scale * self.kept.clean + level * self.kept.noise) + self.kept.mask * x

    def before_keeping(self, x: Tensor, coefficients: Coefficients, positions: Tensor) -> Tensor:
        """What ``keep`` was given, from what it made of it; where nothing is redrawn, ``x`` as it is."""
        if self.kept is None:
            return x
        mask, kept = self.kept.mask, self.keep(torch.zeros_like(x), coefficients, positions)
        return torch.where(mask > 0, (x - kept) / torch.where(mask > 0, mask, 1.0), x)

    def keep_clean(self, predicted: Tensor) -> Tensor:
        """Predicted clean latents (B, 4, h, w), with the pictures' own where those are kept."""
        return predicted if self.kept is None else torch.lerp(self.kept.clean, predicted, self.kept.mask)


def start_inpainting(
    pictures: Tensor,
    masked: Masked,
    strength: float,
    table: SamplerTable,
    encode: Callable[[Tensor], Tensor],
    draw: Callable[[], Tensor],
) -> tuple[Tensor, Inpainting]:
    """The first ``x`` (n, 4, h, w) of inpainted pictures, and what they need, drawn in diffusers' order.

    A whole ``strength`` of 1 starts from noise alone, as diffusers does; less from the noised picture.

    Args:
        pictures: (I, 3, H, W) float32 in [-1, 1].
        masked: what of them is redrawn.
        strength: above 0, at most 1.
        table: the sampler's.
        encode: from pictures (I, 3, H, W) to latents (I, 4, h, w) drawn from the VAE's posterior.
        draw: unit noise (n, 4, h, w), n a multiple of I.
    """
    clean = encode(pictures) if strength < 1 or not masked.tells else pictures[:0]
    noise = draw()
    times = len(noise) // len(pictures), 1, 1, 1
    if strength == 1:
        x = table.start_noise * noise
    else:
        x = table.image_scale * clean.repeat(times) + table.image_noise * noise
    factor = masked.masks.shape[-1] // noise.shape[-1]
    mask = masked.masks[:, :, ::factor, ::factor].to(noise.device)  # the nearest, as diffusers takes it
    if masked.tells:
        without = encode(pictures * (masked.masks < HALF))
        return x, Inpainting(None, torch.cat([(mask >= HALF).float(), without], dim=1).repeat(times))
    draw()  # for the masked picture, which diffusers encodes here too, and leaves unused
    return x, Inpainting(Kept(mask.repeat(times), clean.repeat(times), noise), None)


def join_inpainting(parts: Sequence[Inpainting | None], like: Sequence[Tensor]) -> Inpainting | None:
    """Of several batches with latents ``like`` (B, 4, h, w) of theirs; one that keeps nothing is redrawn everywhere."""
    there = [one for one in parts if one is not None]
    if not there:
        return None
    told = [one.told for one in there if one.told is not None]
    if told:  # a model of nine channels, all of whose pictures have it
        return Inpainting(None, torch.cat(told))
    pairs = zip(parts, like, strict=True)
    kept = [_redrawn(x) if one is None or one.kept is None else one.kept for one, x in pairs]
    mask, clean, noise = (torch.cat([getattr(one, name) for one in kept]) for name in ("mask", "clean", "noise"))
    return Inpainting(Kept(mask, clean, noise), None)


def _redrawn(x: Tensor) -> Kept:
    nothing = torch.zeros_like(x)
    return Kept(torch.ones_like(x[:, :1]), nothing, nothing)
