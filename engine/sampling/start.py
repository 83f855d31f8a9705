"""Where trajectories start: noise of the seeds, given latents, or noised pictures; and the noise of later steps."""

from __future__ import annotations

import torch
from torch import Tensor

from ..methods.dci import DCI
from .inpaint import Inpainting, start_inpainting
from .request import Request
from .seeds import Noise, auxiliary_seed
from .table import SamplerTable
from .vae_runner import VAERunner


def start(
    request: Request, table: SamplerTable, vae: VAERunner, device: torch.device
) -> tuple[Tensor, list[Tensor], Inpainting | None]:
    """The first ``x``, the noise of every step that draws some, in diffusers' order, and what inpainting needs.

    Where an auxiliary branch has noise of its own, the images' starts (I, 4, h, w) are followed by as many auxiliary
    ones.
    """
    n_images, seeds = len(request.seeds), request.seeds
    if any(isinstance(one, DCI) and one.noise == "independent" for one in request.customizations):
        seeds = (*seeds, *map(auxiliary_seed, seeds))
    draw = Noise(request, seeds[n_images:], (vae.latent_channels, *(n // vae.factor for n in request.size)), device)
    inpainting = None

    def encode(pictures: Tensor) -> Tensor:
        noise = draw.of_pictures() if vae.is_random else torch.zeros((), device=device)
        return _clean_latents(request, pictures, vae, noise, device)

    if request.image is not None and request.masked is not None:
        strength = request.options.strength
        x, inpainting = start_inpainting(request.image, request.masked, strength, table, encode, draw.start)
    elif request.image is not None:
        clean = encode(request.image).repeat(len(seeds) // n_images, 1, 1, 1)
        x = table.image_scale * clean + table.image_noise * draw.start()
    elif request.latents is not None:
        given = request.latents.to(device)
        x = table.start_noise * (given if len(seeds) == n_images else torch.cat([given, draw()[n_images:]]))
    else:
        x = table.start_noise * draw.start()
    return x, [draw() for _ in range(table.noise_draws)], inpainting


def _clean_latents(request: Request, pictures: Tensor, vae: VAERunner, noise: Tensor, device: torch.device) -> Tensor:
    """The pictures' latents (I, 4, h, w) as the UNet sees them, drawn from the VAE's posterior if it has one."""
    options = request.options
    mean, std = vae.posterior(pictures.to(device), options.vae_slicing, options.vae_tiling)
    return (mean.float() + std.float() * noise) * vae.vae.config.scaling_factor
