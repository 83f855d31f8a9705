"""CLIP's picture transformer (Radford et al. 2021, arXiv:2103.00020), from transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor


class ImageEncoder:
    """Embeds pictures.

    Args:
        model: a ``CLIPVisionModelWithProjection``.
        processor: a ``CLIPImageProcessor``: resizes the shorter side, takes the middle square, normalises.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.embed_dim: int = model.config.projection_dim
        self.hidden_size: int = model.config.hidden_size

    def pixels(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(n, 3, s, s) of the model's size, device and dtype."""
        pixels = self.processor(list(pictures), return_tensors="pt")["pixel_values"]
        return pixels.to(self.model.device, self.model.dtype)

    def embed(self, pixels: Tensor) -> Tensor:
        """Projected embeddings (n, embed_dim)."""
        return self.model(pixels).image_embeds

    def features(self, pixels: Tensor) -> Tensor:
        """What the last layer but one gives for the class and every patch (n, 1 + patches, hidden_size)."""
        return self.model(pixels, output_hidden_states=True).hidden_states[-2]
