"""A request to draw pictures, checked: every value that cannot be honoured is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..checks import check_integer, check_texts
from ..methods.dci import DCI
from ..methods.image_prompt import ImagePrompt, prompts_per_image
from .arguments import DEFAULT_STRENGTH, DEFAULT_UPSCALE_STRENGTH, Customization, Options
from .given import as_given, one_per_image
from .hints import make_hints
from .mask import Masked, check_mask, cut, read_masks
from .samplers import WITH_ETA
from .seeds import read_seeds


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a loaded model accepts.

    Attributes:
        factor, sample_size, latent_channels, num_train_timesteps: of the model.
        takes_masks: whether it is an inpainting model, whose UNet sees a picture and its mask beside the latents.
        max_pixels: of one picture.
        check_memory: ``check_memory(n_images, height, width, options)`` raises where the memory cannot hold a request.
    """

    factor: int
    sample_size: int
    latent_channels: int
    num_train_timesteps: int
    takes_masks: bool
    max_pixels: int
    check_memory: Callable[[int, int, int, Options], None]


@dataclass(frozen=True, slots=True)
class Request:
    """One call of ``generate``.

    Attributes:
        options: as given, with the steps that are taken and the size that is drawn.
        prompts, negative_prompts, seeds, customizations, image_prompts: one entry per image.
        begin: the first step taken.
        image: (I, 3, H, W) float32 in [-1, 1].
        latents: (I, 4, h, w) float32.
        masked: what of the pictures is redrawn; None where they are as wholes.
        hints: each control's pictures; see ``hints.make_hints``.
        variation_seeds: one entry per image; none where starts do not vary.
        generators: what noise is drawn from in place of the seeds' own generators, one per image or one for all.
    """

    options: Options
    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    customizations: tuple[Customization | None, ...]
    image_prompts: tuple[tuple[ImagePrompt, ...], ...]
    begin: int
    image: Tensor | None
    latents: Tensor | None
    masked: Masked | None = None
    hints: tuple[Tensor, ...] = ()
    variation_seeds: tuple[int, ...] = ()
    generators: tuple[torch.Generator, ...] = ()

    def start_of(self, i: int) -> tuple[int | None, ...]:
        """Tells the starts of images from one another: by their seeds, where these say all."""
        own = self.image is not None or self.latents is not None or self.generators
        return self.seeds[i], *self.variation_seeds[i : i + 1], i if own else None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        assert self.options.height is not None
        assert self.options.width is not None
        return self.options.height, self.options.width

    def settings(self) -> dict[str, Any]:
        """How a result describes it, JSON-serialisable; pictures and latents are not included."""
        return {
            "prompts": list(self.prompts),
            "negative_prompts": list(self.negative_prompts),
            "seeds": list(self.seeds),
            "variation_seeds": list(self.variation_seeds or [None] * len(self.seeds)),
            "customizations": [None if one is None else one.settings() for one in self.customizations],
            "image_prompts": [[one.settings() for one in own] for own in self.image_prompts],
            **{one.name: getattr(self.options, one.name) for one in fields(Options) if one.metadata["setting"]},
            "strength": None if self.image is None else self.options.strength,
            "mask_blur": None if self.masked is None else self.options.mask_blur,
            "mask_padding": self.options.mask_padding,
            "given_latents": self.latents is not None,
            "control": [one.settings() for one in self.options.control],
            "given_generators": bool(self.generators),
        }


def make_request(limits: ModelLimits, prompt: str | Sequence[str], options: Options) -> Request:
    """Check and complete the arguments of ``Engine.generate``; raises ``ValueError`` with the rule and the value."""
    prompts = check_texts("prompt", prompt)
    per_prompt = options.images_per_prompt
    n_images = len(prompts) * per_prompt
    negatives = _negatives(options, len(prompts))
    check_integer("steps", options.steps, 1, limits.num_train_timesteps)
    _check_together(options)
    check_mask(options, limits.takes_masks)
    pictures = None
    if options.image is not None:
        given = as_given("image", "picture", options.image, len(prompts), n_images)
        pictures = [_to_pil(picture) for picture in given]
    whole = pictures if options.mask_padding is None else None  # a crop has the size that the model draws best
    height, width = _size(limits, options, None if whole is None else whole[0])
    limits.check_memory(n_images, height, width, options)
    if pictures is not None:
        pictures = one_per_image(pictures, n_images)
    masked = None
    if pictures is not None and options.mask is not None:
        pictures, masks, crops = cut(options, pictures, read_masks(options, len(prompts)), (height, width))
        masked = Masked(masks, limits.takes_masks, crops)
    customizations = _customizations(options, n_images)
    steps = _shortened(customizations, options.steps)
    begin = 0 if pictures is None else steps - int(steps * options.strength)
    if begin == steps:
        rule = "int(steps * strength) must be at least 1"
        raise ValueError(f"{rule}, got steps={steps} and strength={options.strength}")
    seeds, variation_seeds, generators = read_seeds(options, n_images)
    return Request(
        options=replace(options, steps=steps, height=height, width=width),
        prompts=tuple(text for text in prompts for _ in range(per_prompt)),
        negative_prompts=tuple(text for text in negatives for _ in range(per_prompt)),
        seeds=seeds,
        customizations=customizations,
        image_prompts=prompts_per_image(options.image_prompts, n_images),
        begin=begin,
        image=None if pictures is None else _image_tensor(pictures, height, width),
        latents=None if options.latents is None else _start_noise(limits, options.latents, n_images, height, width),
        masked=masked,
        hints=make_hints(options.control, len(prompts), n_images, (height, width), limits.factor),
        variation_seeds=variation_seeds,
        generators=generators,
    )


def _check_together(options: Options) -> None:
    """Refuse options that do not go with one another."""
    if options.eta and options.sampler not in WITH_ETA:
        rule = f"eta belongs to {' and '.join(WITH_ETA)} alone"
        raise ValueError(f"{rule}, got eta={options.eta} with sampler={options.sampler!r}")
    if options.guidance_rescale and options.guidance_scale == 1:
        rule = "guidance_rescale needs a guidance_scale above 1, whose result it rescales"
        raise ValueError(f"{rule}, got guidance_rescale={options.guidance_rescale}")
    if options.image is None and options.strength != DEFAULT_STRENGTH:
        raise ValueError(f"strength belongs to image-to-image: give an image too, got strength={options.strength}")
    _check_upscale(options)
    if options.image is not None and options.latents is not None:
        raise ValueError("give image or latents, not both: each says where the picture starts")
    if options.output == "latent" and options.image is None and (options.vae_slicing or options.vae_tiling):
        raise ValueError("vae_slicing and vae_tiling belong to the VAE, which output='latent' does not run")


def _check_upscale(options: Options) -> None:
    if options.upscale != 1:
        rule = "upscale draws twice, which generate does, also with a scheduler; a request is one pass"
        raise ValueError(f"{rule}, got upscale={options.upscale:g}")
    if options.upscale_strength != DEFAULT_UPSCALE_STRENGTH or options.upscale_steps is not None:
        rule = "upscale_strength and upscale_steps belong to a second pass: give upscale too"
        raise ValueError(f"{rule}, got {options.upscale_strength} and {options.upscale_steps}")


def _negatives(options: Options, n_prompts: int) -> tuple[str, ...]:
    negatives = check_texts("negative_prompt", options.negative_prompt)
    if isinstance(options.negative_prompt, str):
        negatives *= n_prompts
    if len(negatives) != n_prompts:
        raise ValueError(f"negative_prompt must be one text or one per prompt ({n_prompts}), got {len(negatives)}")
    if options.guidance_scale == 1 and any(negatives):
        rule = "negative_prompt needs a guidance_scale above 1, which it acts through"
        raise ValueError(f"{rule}, got {list(negatives)}")
    return negatives


def _customizations(options: Options, n_images: int) -> tuple[Customization | None, ...]:
    """One per image: as given, or the same for all."""
    given: Any = [options.customization] * n_images
    if isinstance(options.customization, list | tuple):
        given = options.customization
    if len(given) != n_images:
        raise ValueError(f"customization must be one, or one per image ({n_images}), got {len(given)}")
    for one in given:
        if one is not None and not isinstance(one, Customization):
            kinds = "an engine.Infusion, engine.ICO, engine.DCI, None, or a list of these"
            raise ValueError(f"customization must be {kinds}, got {one!r}")
    masked = [one for one in given if isinstance(one, DCI) and one.masked and one.fraction]
    if options.record_masks and not masked:
        rule = "record_masks needs an image that mixes by masks: an engine.DCI with masked=True, fraction > 0"
        raise ValueError(rule)
    return tuple(one.for_image(i, n_images) if isinstance(one, DCI) else one for i, one in enumerate(given))


def _shortened(customizations: Sequence[Customization | None], steps: int) -> int:
    """The steps to take, which match_cost may make fewer."""
    taken = {custom.shortened(steps) if isinstance(custom, DCI) else steps for custom in customizations}
    if len(taken) > 1:
        raise ValueError(f"match_cost must leave all images of a request the same steps, got {sorted(taken)}")
    return taken.pop()


def _size(limits: ModelLimits, options: Options, picture: Image.Image | None) -> tuple[int, int]:
    """Height and width in pixels: as given; or of what the pictures start from, else of the model."""
    factor, latents = limits.factor, options.latents
    height, width = limits.sample_size * factor, limits.sample_size * factor
    if isinstance(latents, Tensor) and latents.ndim == 4:
        height, width = latents.shape[2] * factor, latents.shape[3] * factor
    elif picture is not None:  # diffusers' rule: the picture's own size, rounded down
        height, width = picture.height // factor * factor, picture.width // factor * factor
    height = check_integer("height", height if options.height is None else options.height, 1)
    width = check_integer("width", width if options.width is None else options.width, 1)
    for name, size in (("height", height), ("width", width)):
        if size % factor:
            raise ValueError(f"{name} must be a multiple of {factor}, got {size}")
    if height * width > limits.max_pixels:
        rule = f"height x width must be at most {limits.max_pixels} pixels (max_pixels of engine.load)"
        raise ValueError(f"{rule}, got {height}x{width}")
    return height, width


def _start_noise(limits: ModelLimits, latents: Any, n_images: int, height: int, width: int) -> Tensor:
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        raise ValueError(f"latents must be a floating-point tensor, got {getattr(latents, 'dtype', type(latents))}")
    shape = (n_images, limits.latent_channels, height // limits.factor, width // limits.factor)
    if latents.shape != shape:
        raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
    if not torch.isfinite(latents).all():
        raise ValueError("latents must be finite, got NaN or infinity")
    return latents.detach().float()


def _to_pil(picture: Any) -> Image.Image:
    if isinstance(picture, Image.Image):
        return ImageOps.exif_transpose(picture).convert("RGB")
    rule = "image must hold PIL pictures or arrays (H, W, 3), uint8 or float in [0, 1]"
    if not isinstance(picture, np.ndarray) or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"{rule}, got {getattr(picture, 'shape', type(picture))}")
    if picture.dtype == np.uint8:
        return Image.fromarray(picture)
    if picture.dtype.kind != "f" or not np.isfinite(picture).all() or picture.min() < 0 or picture.max() > 1:
        raise ValueError(f"{rule}, got {picture.dtype} from {picture.min()} to {picture.max()}")
    return Image.fromarray((picture * 255).round().astype(np.uint8))


def _image_tensor(pictures: list[Image.Image], height: int, width: int) -> Tensor:
    """(B, 3, H, W) float32 in [-1, 1], resized where the sizes differ."""
    sized = [p if p.size == (width, height) else p.resize((width, height), Image.Resampling.LANCZOS) for p in pictures]
    pixels = np.stack([np.asarray(picture) for picture in sized])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
