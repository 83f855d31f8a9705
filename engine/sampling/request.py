"""A request to draw pictures, checked: every value that cannot be honoured is refused by name."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checks import check_choice, check_flag, check_integer, check_number
from ..methods.dci import DCI
from ..methods.ico import ICO
from ..methods.infusion import Infusion
from .samplers import SAMPLERS

_OUTPUTS = ("pil", "numpy", "latent")
_DEFAULT_STRENGTH = 0.8
_MAX_SEED = 2**64 - 1

Picture = Image.Image | np.ndarray
Customization = Infusion | ICO | DCI
Callback = Callable[[int, int, Tensor], bool | None]


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a loaded model accepts."""

    factor: int
    sample_size: int
    latent_channels: int
    num_train_timesteps: int


@dataclass(frozen=True, slots=True)
class Request:
    """One call of ``generate``; prompts, negative prompts, seeds and customisations have one entry per image."""

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    begin: int
    guidance_scale: float
    sampler: str
    eta: float
    height: int
    width: int
    image: Tensor | None
    strength: float
    latents: Tensor | None
    customizations: tuple[Customization | None, ...]
    attention_words: tuple[str, ...]
    record_masks: bool
    output: str
    callback: Callback | None
    progress: bool
    vae_slicing: bool
    vae_tiling: bool


def make_request(
    limits: ModelLimits,
    *,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str],
    steps: int,
    guidance_scale: float,
    sampler: str,
    eta: float,
    height: int | None,
    width: int | None,
    seed: int | Sequence[int] | None,
    images_per_prompt: int,
    image: Picture | Sequence[Picture] | None,
    strength: float,
    latents: Tensor | None,
    customization: Any,
    attention_words: Sequence[str],
    record_masks: bool,
    output: str,
    callback: Callback | None,
    progress: bool,
    vae_slicing: bool,
    vae_tiling: bool,
) -> Request:
    """Check and complete the arguments of ``Engine.generate``; raises ``ValueError`` with the rule and the value."""
    per_prompt = check_integer("images_per_prompt", images_per_prompt, 1)
    prompts = _texts("prompt", prompt)
    negatives = _texts("negative_prompt", negative_prompt)
    if isinstance(negative_prompt, str):
        negatives *= len(prompts)
    if len(negatives) != len(prompts):
        raise ValueError(f"negative_prompt must be one text or one per prompt ({len(prompts)}), got {len(negatives)}")
    n_images = len(prompts) * per_prompt
    guidance_scale = check_number("guidance_scale", guidance_scale, 1.0)
    if guidance_scale == 1 and any(negatives):
        raise ValueError(f"negative_prompt needs a guidance_scale above 1, which it acts through, got {negatives}")
    check_choice("sampler", sampler, tuple(SAMPLERS))
    steps = check_integer("steps", steps, 1, limits.num_train_timesteps)
    eta = check_number("eta", eta, 0.0, 1.0)
    if eta and sampler != "ddim":
        raise ValueError(f"eta belongs to the ddim sampler alone, got eta={eta} with sampler={sampler!r}")
    strength = check_number("strength", strength, 0.0, 1.0)
    if image is None and strength != _DEFAULT_STRENGTH:
        raise ValueError(f"strength belongs to image-to-image: give an image too, got strength={strength}")
    if image is not None and latents is not None:
        raise ValueError("give image or latents, not both: each says where the picture starts")
    if output == "latent" and image is None and (vae_slicing or vae_tiling):
        raise ValueError("vae_slicing and vae_tiling belong to the VAE, which output='latent' does not run")
    if callback is not None and not callable(callback):
        raise ValueError(f"callback must be callable as callback(step, total, latents), got {callback!r}")
    pictures = None if image is None else _pictures(image, n_images, per_prompt)
    height, width = _size(limits, height, width, pictures, latents)
    customizations = _customizations(customization, n_images)
    steps = _shortened(customizations, steps)
    begin = 0 if image is None else steps - int(steps * strength)
    if begin == steps:
        raise ValueError(f"int(steps * strength) must be at least 1, got steps={steps} and strength={strength}")
    return Request(
        prompts=tuple(text for text in prompts for _ in range(per_prompt)),
        negative_prompts=tuple(text for text in negatives for _ in range(per_prompt)),
        seeds=_seeds(seed, n_images),
        steps=steps,
        begin=begin,
        guidance_scale=guidance_scale,
        sampler=sampler,
        eta=eta,
        height=height,
        width=width,
        image=None if pictures is None else _image_tensor(pictures, height, width),
        strength=strength,
        latents=None if latents is None else _start_noise(limits, latents, n_images, height, width),
        customizations=customizations,
        attention_words=() if attention_words in ((), []) else tuple(_texts("attention_words", attention_words)),
        record_masks=_check_masks(record_masks, customizations),
        output=check_choice("output", output, _OUTPUTS),
        callback=callback,
        progress=check_flag("progress", progress),
        vae_slicing=check_flag("vae_slicing", vae_slicing),
        vae_tiling=check_flag("vae_tiling", vae_tiling),
    )


def _texts(name: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} must be a text or a non-empty list of texts, got {value!r}")
    return list(texts)


def _seeds(seed: Any, n_images: int) -> tuple[int, ...]:
    """One seed per image: as given, counted up from one number, or drawn (and reported) where none is given."""
    if seed is None:
        return tuple(secrets.randbits(32) for _ in range(n_images))
    if isinstance(seed, list | tuple | range):
        if len(seed) != n_images:
            raise ValueError(f"seed must be one integer or one per image ({n_images}), got {len(seed)}")
        return tuple(check_integer("seed", value, 0, _MAX_SEED) for value in seed)
    first = check_integer("seed", seed, 0, _MAX_SEED - (n_images - 1))
    return tuple(range(first, first + n_images))


def _customizations(customization: Any, n_images: int) -> tuple[Customization | None, ...]:
    """One per image: as given, or the same for all."""
    given = customization if isinstance(customization, list | tuple) else [customization] * n_images
    if len(given) != n_images:
        raise ValueError(f"customization must be one, or one per image ({n_images}), got {len(given)}")
    for one in given:
        if one is not None and not isinstance(one, Customization):
            kinds = "an engine.Infusion, engine.ICO, engine.DCI, None, or a list of these"
            raise ValueError(f"customization must be {kinds}, got {one!r}")
    return tuple(one.for_image(i, n_images) if isinstance(one, DCI) else one for i, one in enumerate(given))


def _check_masks(record_masks: Any, customizations: Sequence[Customization | None]) -> bool:
    masked = [custom for custom in customizations if isinstance(custom, DCI) and custom.masked and custom.fraction]
    if check_flag("record_masks", record_masks) and not masked:
        raise ValueError(
            "record_masks needs an image that mixes by masks: an engine.DCI with masked=True, fraction > 0"
        )
    return record_masks


def _shortened(customizations: Sequence[Customization | None], steps: int) -> int:
    """The steps to take, which match_cost may make fewer."""
    taken = {custom.shortened(steps) if isinstance(custom, DCI) else steps for custom in customizations}
    if len(taken) > 1:
        raise ValueError(f"match_cost must leave all images of a request the same steps, got {sorted(taken)}")
    return taken.pop()


def _size(
    limits: ModelLimits, height: Any, width: Any, pictures: list[Image.Image] | None, latents: Any
) -> tuple[int, int]:
    factor = limits.factor
    default = (limits.sample_size * factor, limits.sample_size * factor)
    if isinstance(latents, Tensor) and latents.ndim == 4:
        default = (latents.shape[2] * factor, latents.shape[3] * factor)
    elif pictures is not None:  # diffusers' rule: the picture's own size, rounded down
        default = (pictures[0].height // factor * factor, pictures[0].width // factor * factor)
    sizes = []
    for name, value, otherwise in (("height", height, default[0]), ("width", width, default[1])):
        size = check_integer(name, otherwise if value is None else value, 1)
        if size % factor:
            raise ValueError(f"{name} must be a multiple of {factor}, got {size}")
        sizes.append(size)
    return sizes[0], sizes[1]


def _start_noise(limits: ModelLimits, latents: Any, n_images: int, height: int, width: int) -> Tensor:
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        raise ValueError(f"latents must be a floating-point tensor, got {getattr(latents, 'dtype', type(latents))}")
    shape = (n_images, limits.latent_channels, height // limits.factor, width // limits.factor)
    if latents.shape != shape:
        raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
    if not torch.isfinite(latents).all():
        raise ValueError("latents must be finite, got NaN or infinity")
    return latents.detach().float()


def _pictures(image: Any, n_images: int, per_prompt: int) -> list[Image.Image]:
    given = list(image) if isinstance(image, list | tuple) or getattr(image, "ndim", 0) == 4 else [image]
    if len(given) == n_images // per_prompt:
        given = [picture for picture in given for _ in range(per_prompt)]
    elif len(given) == 1:
        given = given * n_images
    if len(given) != n_images:
        raise ValueError(f"image must be one picture, one per prompt or one per image ({n_images}), got {len(given)}")
    return [_to_pil(picture) for picture in given]


def _to_pil(picture: Any) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
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
