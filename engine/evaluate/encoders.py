"""Encoders of pictures and texts: CLIP and DINO of the user's choice, and the embedded model's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_BATCH = 16
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PictureEncoder(Protocol):
    """Embeds pictures.

    Attributes:
        name: what a report calls it: figures of different encoders cannot be compared.
    """

    @property
    def name(self) -> str: ...

    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """(n, E) float32, of unit length."""
        ...


class TextEncoder(PictureEncoder, Protocol):
    """Embeds pictures and texts into one space."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(n, E) float32, of unit length."""
        ...


class CLIP:
    """A CLIP model of transformers (Radford et al. 2021, arXiv:2103.00020), with its own preprocessing.

    Args:
        model: a folder, or a hub id that is there or can be downloaded; "openai/clip-vit-base-patch32" and
            "openai/clip-vit-large-patch14" are what papers use, with very different figures.
        device: where it runs.

    Raises:
        ValueError: there is no such model, or it is no CLIP.
    """

    def __init__(self, model: str | Path, device: str | torch.device = "cpu") -> None:
        from transformers import AutoConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

        config = _read(AutoConfig, model)
        if config.model_type != "clip":
            raise ValueError(f"clip must be a CLIP model, got {str(model)!r}, which is {config.model_type!r}")
        self.name = Path(model).name
        self.model = _read(CLIPModel, model).to(device).eval().requires_grad_(False)
        self.processor, self.tokenizer = _read(CLIPImageProcessor, model), _read(CLIPTokenizer, model)
        self.device = device

    @torch.no_grad()
    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        found = []
        for batch in _batches(images):
            pixels = self.processor([image.convert("RGB") for image in batch], return_tensors="pt")["pixel_values"]
            pooled = self.model.vision_model(pixel_values=pixels.to(self.device)).pooler_output
            found.append(self.model.visual_projection(pooled))
        return _unit(found)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        found, length = [], self.model.config.text_config.max_position_embeddings
        for batch in _batches(texts):
            options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
            tokens = self.tokenizer(list(batch), **options).to(self.device)
            found.append(self.model.text_projection(self.model.text_model(**tokens).pooler_output))
        return _unit(found)


class DINO:
    """A vision transformer's class token (Caron et al. 2021, arXiv:2104.14294), as DreamBooth measures with it.

    Pictures are resized to 256 pixels on their shorter side, and their middle 224 x 224 is seen; in proportion, where
    the model is for other sizes.

    Args:
        model: a folder or hub id; "facebook/dino-vits16" is the papers'.
        device: where it runs.

    Raises:
        ValueError: there is no such model, or it has no class token.
    """

    def __init__(self, model: str | Path, device: str | torch.device = "cpu") -> None:
        from transformers import AutoConfig, AutoModel

        config = _read(AutoConfig, model)
        if config.model_type not in ("vit", "dinov2"):
            raise ValueError(f"dino must be a ViT or DINOv2 model, got {str(model)!r}, which is {config.model_type!r}")
        self.name = Path(model).name
        self.model = _read(AutoModel, model).to(device).eval().requires_grad_(False)
        self.side = 224 if config.model_type == "dinov2" else config.image_size
        self.device = device

    @torch.no_grad()
    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        found = []
        for batch in _batches(images):
            pixels = torch.stack([self._pixels(image) for image in batch]).to(self.device)
            found.append(self.model(pixel_values=pixels).last_hidden_state[:, 0])
        return _unit(found)

    def _pixels(self, image: Image.Image) -> Tensor:
        shorter = round(self.side * 256 / 224)
        scale = shorter / min(image.size)
        size = max(shorter, round(image.width * scale)), max(shorter, round(image.height * scale))
        resized = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        left, top = (resized.width - self.side) // 2, (resized.height - self.side) // 2
        middle = np.asarray(resized.crop((left, top, left + self.side, top + self.side)))
        scaled = (middle / 255 - np.array(_IMAGENET_MEAN)) / np.array(_IMAGENET_STD)
        return torch.from_numpy(scaled).permute(2, 0, 1).float()


class Tinyworld:
    """The embedded model's own contrastive encoder: for its pictures alone."""

    name = "tinyworld"

    def __init__(self) -> None:
        from .tinyworld import load_evaluator

        self.model = load_evaluator()

    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        sized = [image.convert("RGB").resize((128, 128), Image.Resampling.LANCZOS) for image in images]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in sized])).permute(0, 3, 1, 2)
        return self.model.embed_pictures(pixels.float() / 127.5 - 1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        return self.model.embed_texts(texts)


def _read(kind: Any, model: str | Path) -> Any:
    try:
        return kind.from_pretrained(str(model))
    except (OSError, ValueError) as error:
        raise ValueError(f"{model} must be a model of transformers, a folder or a hub id: {error}") from error


def _batches(items: Sequence[Any]) -> list[Sequence[Any]]:
    if not len(items):
        raise ValueError("there must be at least one picture or text to embed, got none")
    return [items[first : first + _BATCH] for first in range(0, len(items), _BATCH)]


def _unit(parts: list[Tensor]) -> Tensor:
    return torch.nn.functional.normalize(torch.cat(parts).float().cpu(), dim=1)
