"""Where trajectories start: noise of the seeds, given latents, or noised pictures; and the noise of later steps."""

from __future__ import annotations

import torch
from torch import Tensor

from ..methods.dci import DCI
from .request import Request
from .seeds import Noise, auxiliary_seed
from .table import SamplerTable
from .vae_runner import VAERunner


def start(request: Request, table: SamplerTable, vae: VAERunner, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """The first ``x``, and the noise of every step that draws some, in the order diffusers would draw it.

    Where an auxiliary branch has noise of its own, the images' starts (I, 4, h, w) are followed by as many auxiliary
    ones.
    """
    n_images, seeds = len(request.seeds), request.seeds
    if any(isinstance(one, DCI) and one.noise == "independent" for one in request.customizations):
        seeds = (*seeds, *map(auxiliary_seed, seeds))
    draw = Noise(request, seeds[n_images:], (vae.latent_channels, *(n // vae.factor for n in request.size)), device)
    if request.image is not None:
        clean = _clean_latents(request, vae, draw.of_pictures(), device).repeat(len(seeds) // n_images, 1, 1, 1)
        x = table.image_scale * clean + table.image_noise * draw.start()
    elif request.latents is not None:
        given = request.latents.to(device)
        x = table.start_noise * (given if len(seeds) == n_images else torch.cat([given, draw()[n_images:]]))
    else:
        x = table.start_noise * draw.start()
    return x, [draw() for _ in range(table.noise_draws)]


def _clean_latents(request: Request, vae: VAERunner, noise: Tensor, device: torch.device) -> Tensor:
    """The pictures' latents (I, 4, h, w) as the UNet sees them, drawn from the VAE's posterior."""
    assert request.image is not None
    options = request.options
    mean, std = vae.posterior(request.image.to(device), options.vae_slicing, options.vae_tiling)
    return (mean.float() + std.float() * noise) * vae.vae.config.scaling_factor
