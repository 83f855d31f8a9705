"""Pictures of what a model predicts on the way: by a TAESD, or by a linear map from latents to colours."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...models.tiny_vae import VAE, DecoderTiny

_SAMPLES, _SIDE = 8, 16


class Previews:
    """Without a decoder, colours are ``W z + b`` of each latent position, by least squares over what the VAE decodes of
    smooth latents; fitting decodes eight small pictures.

    Args:
        vae: the model's.
        decoder: for its latents; see ``weights.tiny_vae_file.read_tiny_decoder``.
    """

    @torch.no_grad()
    def __init__(self, vae: VAE, decoder: DecoderTiny | None = None) -> None:
        self.decoder, self.like = decoder, vae.weight
        self.factor = vae.config.factor
        if decoder is None:
            self.map = _fitted(vae)

    @torch.no_grad()
    def picture(self, latents: Tensor) -> Image.Image:
        """Of latents (4, h, w), as large as the picture will be."""
        if self.decoder is not None:
            return _to_picture(self.decoder(latents[None].to(self.like))[0].permute(1, 2, 0).float().cpu())
        pixels = torch.einsum("chw,cd->hwd", latents.float().cpu(), self.map[:-1]) + self.map[-1]
        picture = _to_picture(pixels)
        return picture.resize((picture.width * self.factor, picture.height * self.factor), Image.Resampling.BILINEAR)


def _fitted(vae: VAE) -> Tensor:
    """The map (C + 1, 3)."""
    channels = vae.config.latent_channels
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(_SAMPLES, channels, 4, 4, generator=generator)
    latents = F.interpolate(coarse, size=(_SIDE, _SIDE), mode="bilinear") * 1.5
    decoded = vae.decode(latents.to(vae.weight) / vae.config.scaling_factor, False, False).float().cpu()
    colours = F.avg_pool2d(decoded, vae.config.factor).permute(0, 2, 3, 1).reshape(-1, 3)
    known = latents.permute(0, 2, 3, 1).reshape(-1, channels)
    known = torch.cat([known, torch.ones(len(known), 1)], dim=1)
    return torch.linalg.lstsq(known, colours).solution


def _to_picture(pixels: Tensor) -> Image.Image:
    """Of (h, w, 3) near [-1, 1]."""
    small = (pixels / 2 + 0.5).clamp(0, 1).numpy()
    return Image.fromarray((small * 255).round().astype(np.uint8))
