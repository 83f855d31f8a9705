"""Small pictures of latents on their way: a linear map from latents to colours, fitted once to the VAE."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...models.vae import AutoencoderKL

_SAMPLES, _SIDE = 8, 16


class Previews:
    """Colours are ``W z + b`` of each latent position, by least squares over what the VAE decodes of smooth latents.

    Fitting decodes eight small pictures.
    """

    @torch.no_grad()
    def __init__(self, vae: AutoencoderKL) -> None:
        like, channels = vae.quant_conv.weight, vae.config.latent_channels
        generator = torch.Generator().manual_seed(0)
        coarse = torch.randn(_SAMPLES, channels, 4, 4, generator=generator)
        latents = F.interpolate(coarse, size=(_SIDE, _SIDE), mode="bilinear") * 1.5
        decoded = vae.decode(latents.to(like) / vae.config.scaling_factor, False, False).float().cpu()
        colours = F.avg_pool2d(decoded, vae.config.factor).permute(0, 2, 3, 1).reshape(-1, 3)
        known = latents.permute(0, 2, 3, 1).reshape(-1, channels)
        known = torch.cat([known, torch.ones(len(known), 1)], dim=1)
        self.map = torch.linalg.lstsq(known, colours).solution  # (C + 1, 3)
        self.factor = vae.config.factor

    def picture(self, latents: Tensor) -> Image.Image:
        """Of latents (4, h, w), as large as the picture will be."""
        pixels = torch.einsum("chw,cd->hwd", latents.float().cpu(), self.map[:-1]) + self.map[-1]
        small = (pixels / 2 + 0.5).clamp(0, 1).numpy()
        picture = Image.fromarray((small * 255).round().astype(np.uint8))
        return picture.resize((picture.width * self.factor, picture.height * self.factor), Image.Resampling.BILINEAR)
