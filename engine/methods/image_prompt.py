"""Pictures as prompts (IP-Adapter, Ye et al. 2023, arXiv:2308.06721): keys and values beside those of the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..checks import check_number
from ..errors import CheckpointError
from ..models.conditioning import TextKV
from ..models.image_encoder import ImageEncoder
from ..models.image_projection import ImageProjection
from ..models.unet import UNet2DConditionModel
from ..read_picture import read_picture
from ..weights.checkpoint import open_image_encoder
from ..weights.ip_adapter_file import IPAdapterWeights, read_ip_adapter
from ..weights.tensors import fill_positions, load_module

if TYPE_CHECKING:
    from ..engine import Engine

_LARGEST = 100.0


class IPAdapter:
    """An adapter for one model. It changes none of the model's weights: what it makes of a picture are rows of text.

    Attributes:
        name: the file's stem.
        weights: its projection of a picture's features to tokens, and of tokens to keys and values.
        encoder: embeds pictures.
    """

    def __init__(self, name: str, weights: IPAdapterWeights, encoder: ImageEncoder) -> None:
        self.name, self.weights, self.encoder = name, weights, encoder

    @classmethod
    def load(cls, path: str | Path, sd: Engine, image_encoder: str | Path) -> IPAdapter:
        """Read an adapter for a model, to its device and in its dtype.

        Args:
            path: a ``.safetensors`` file of a plain IP-Adapter or an IP-Adapter Plus, in the original layout or with
                diffusers' names.
            sd: the model; Engines made of it by ``with_loras`` take the adapter too.
            image_encoder: the folder of a ``CLIPVisionModelWithProjection``.

        Raises:
            CheckpointError: a file is missing, damaged, of another kind, or does not fit the model or the encoder.
        """
        path, like = Path(path), sd.unet.conv_in.weight
        weights = read_ip_adapter(path, _shapes(sd.unet), like.device, like.dtype)
        encoder = _load_encoder(Path(image_encoder), like.device, like.dtype)
        is_plain = isinstance(weights.projection, ImageProjection)
        what, found = ("projection_dim", encoder.embed_dim) if is_plain else ("hidden_size", encoder.hidden_size)
        if found != weights.projection.in_features:
            rule = f"{what} must be {weights.projection.in_features} to fit {path.name}"
            raise CheckpointError(f"{image_encoder}: {rule}, got {found}")
        return cls(path.stem, weights, encoder)

    @torch.no_grad()
    def tokens(self, pictures: Sequence[Image.Image]) -> Tensor:
        """The tokens (n * S, E) of n pictures, one after the other."""
        return self._tokens(self.encoder.pixels(pictures)).flatten(0, 1)

    @cached_property
    @torch.no_grad()
    def no_picture(self) -> Tensor:
        """What stands for a picture in unconditional rows (S, E).

        The tokens of an embedding of zeros; of a resampler, those of a picture whose normalised pixels are zeros.
        """
        if isinstance(self.weights.projection, ImageProjection):
            like = self.weights.projection.image_embeds.weight
            return self.weights.projection(like.new_zeros(1, self.encoder.embed_dim))[0]
        size = self.encoder.model.config.image_size
        like = next(self.encoder.model.parameters())
        return self._tokens(like.new_zeros(1, 3, size, size))[0]

    def _tokens(self, pixels: Tensor) -> Tensor:
        """(n, S, E)."""
        is_plain = isinstance(self.weights.projection, ImageProjection)
        return self.weights.projection(self.encoder.embed(pixels) if is_plain else self.encoder.features(pixels))

    @torch.no_grad()
    def keys_and_values(self, tokens: Tensor, scale: float) -> TextKV:
        """Per cross-attention layer, keys and values (S, C) of tokens (S, E), the values times ``scale``.

        Attention is linear in its values: ``scale * attn(q, K, V) = attn(q, K, scale * V)`` (sections 3.2.2, 3.2.3).
        """
        return tuple((F.linear(tokens, k), scale * F.linear(tokens, v)) for k, v in self.weights.layers.values())

    def check_fit(self, unet: UNet2DConditionModel) -> None:
        """Raise ``ValueError`` unless it was loaded for this UNet, or one of its kind, device and dtype."""
        own = {name: tuple(k.shape) for name, (k, _) in self.weights.layers.items()}
        shapes = _shapes(unet)
        if own != shapes:
            rule = f"image_prompts must be of an adapter for this model's {len(shapes)} cross-attention layers"
            raise ValueError(f"{rule} and their widths, got {self.name!r}, which was loaded for another")
        has, (key, _) = unet.conv_in.weight, next(iter(self.weights.layers.values()))
        if (key.device, key.dtype) != (has.device, has.dtype):
            rule = f"image_prompts must be of an adapter in {has.dtype} on {has.device}, as this model is"
            raise ValueError(f"{rule}, got {self.name!r} in {key.dtype} on {key.device}")


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """A picture that a request is drawn like, by an adapter.

    Attributes:
        adapter: whose it is.
        image: a picture (a file, PIL, or an array (H, W, 3) uint8), of which the adapter sees the middle square; or
            several, which are attended to together. They are read at once, and kept as a tuple of PIL pictures.
        scale: how much it counts beside the text, -100 to 100; 0 not at all.

    Raises:
        ValueError: one of these is none.
    """

    adapter: IPAdapter
    image: Any
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.adapter, IPAdapter):
            raise ValueError(f"adapter must be an engine.IPAdapter, got {self.adapter!r}")
        given = self.image if isinstance(self.image, list | tuple) else [self.image]
        if not given:
            raise ValueError("image must be a picture, or a list of at least one, got an empty list")
        object.__setattr__(self, "image", tuple(read_picture(picture) for picture in given))
        object.__setattr__(self, "scale", check_number("scale", self.scale, -_LARGEST, _LARGEST))

    @cached_property
    def tokens(self) -> Tensor:
        """The pictures' tokens (n * S, E), computed once."""
        return self.adapter.tokens(self.image)

    def settings(self) -> dict[str, Any]:
        """How a result describes it."""
        return {"adapter": self.adapter.name, "pictures": len(self.image), "scale": self.scale}


ImagePrompts = ImagePrompt | Sequence[ImagePrompt | Sequence[ImagePrompt] | None] | None


def prompts_per_image(given: Any, n_images: int) -> tuple[tuple[ImagePrompt, ...], ...]:
    """The image prompts of each of a request's images.

    Args:
        given: one or a list of them, which all act on every image; or a list with a list, or None, per image.
        n_images: how many.

    Raises:
        ValueError: it is something else.
    """
    rule = "image_prompts must be an engine.ImagePrompt, a list of them for all images, or a list with a list per image"
    if given is None or isinstance(given, ImagePrompt):
        return (() if given is None else (given,),) * n_images
    if not isinstance(given, list | tuple):
        raise ValueError(f"{rule}, got {given!r}")
    if all(isinstance(one, ImagePrompt) for one in given):
        return (tuple(given),) * n_images
    if len(given) != n_images:
        raise ValueError(f"{rule} ({n_images}), got {len(given)}")
    for one in given:
        is_list = isinstance(one, list | tuple) and all(isinstance(prompt, ImagePrompt) for prompt in one)
        if one is not None and not is_list:
            raise ValueError(f"{rule}, got {one!r} for one of several images")
    return tuple(() if one is None else tuple(one) for one in given)


def _shapes(unet: UNet2DConditionModel) -> dict[str, tuple[int, int]]:
    """By cross-attention layer, in forward order, the shape (C, E) of its projections of the text."""
    layers = unet.cross_attentions.items()
    return {name: (attn2.to_k.out_features, attn2.to_k.in_features) for name, attn2 in layers}


def _load_encoder(folder: Path, device: torch.device, dtype: torch.dtype) -> ImageEncoder:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    config, source = open_image_encoder(folder, prefer_fp16=dtype == torch.float16)
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
    load_module(model, source, device, dtype)
    fill_positions(model, device)
    if (folder / "preprocessor_config.json").is_file():
        processor = CLIPImageProcessor.from_pretrained(str(folder), local_files_only=True)
    else:
        size: Any = model.config.image_size
        processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return ImageEncoder(model, processor)
