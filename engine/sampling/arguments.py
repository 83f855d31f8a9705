"""The arguments of ``generate``, each declared once: default, help and check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from torch import Generator, Tensor

from ..checks import check_callable, check_choice, check_flag, check_integer, check_number, check_texts
from ..methods.control import Control, check_controls
from ..methods.dci import DCI
from ..methods.ico import ICO
from ..methods.image_prompt import ImagePrompts
from ..methods.infusion import Infusion
from ..observe.progress import Callback
from ..options import check_options, option
from ..text.chunks import LONG_PROMPTS
from ..text.weighting import WEIGHTINGS
from .samplers import SAMPLERS
from .schedule import SCHEDULES

DEFAULT_STRENGTH = 0.8
DEFAULT_UPSCALE_STRENGTH = 0.5

_OUTPUTS = ("pil", "numpy", "latent")

Picture = Image.Image | np.ndarray
Mask = Image.Image | np.ndarray
Customization = Infusion | ICO | DCI


def _check_words(name: str, value: Any) -> tuple[str, ...]:
    return () if value in ((), []) else check_texts(name, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What ``generate`` takes beside its prompts. A new argument is a field here; all lists of them follow."""

    negative_prompt: str | Sequence[str] = option(
        "", "what to keep away from; one text, or one per prompt.", flags=(), metavar="TEXT"
    )
    steps: int = option(
        50,
        "sampling steps of the whole schedule; heun, dpm2 and dpmpp_sde evaluate the UNet twice a step but the last, "
        "pndm once or more in addition.",
        partial(check_integer, low=1),
        flags=(),
        setting=True,
    )
    guidance_scale: float = option(
        8.0,
        "classifier-free guidance; 1 turns it off, and its UNet rows with it.",
        partial(check_number, low=1.0),
        flags=(),
        metavar="S",
        setting=True,
    )
    guidance_rescale: float = option(
        0.0,
        "how far to bring guidance's result back to the contrast of the conditional prediction, 0 to 1; 0.7 is usual "
        "with models of zero terminal SNR.",
        partial(check_number, low=0.0, high=1.0),
        flags=(),
        setting=True,
    )
    sampler: str = option(
        "ddim",
        f"one of {', '.join(SAMPLERS)}.",
        partial(check_choice, choices=tuple(SAMPLERS)),
        flags=(),
        setting=True,
    )
    schedule: str | None = option(
        None,
        f"where the steps are: one of {', '.join(SCHEDULES)}; the model's own where not given. All but sgm_uniform are "
        "for samplers that take any noise level: not for ddim, ddpm, pndm and lcm; sgm_uniform is for all but lcm.",
        partial(check_choice, choices=SCHEDULES),
        optional=True,
        flags=(),
        metavar="NAME",
        setting=True,
    )
    eta: float = option(
        0.0,
        "ddim's and tcd's share of fresh noise, 0 to 1; for models with a TCD LoRA 0.3 is usual.",
        partial(check_number, low=0.0, high=1.0),
        flags=(),
        setting=True,
    )
    height: int | None = option(
        None,
        "in pixels, a multiple of the VAE's factor (8); the model's own where not given.",
        partial(check_integer, low=1),
        optional=True,
        setting=True,
    )
    width: int | None = option(None, "as height.", partial(check_integer, low=1), optional=True, setting=True)
    seed: int | Sequence[int] | None = option(
        None,
        "one integer, counted up over the images, or one per image; drawn below 2^32 and reported where not given. A "
        'seed is float32 noise of torch.Generator("cpu"), so a picture depends neither on its batch nor on the device, '
        "beyond rounding. That generator keeps a seed's low 32 bits alone: those that differ by 2^32 are one.",
        flags=(),
        metavar="N[,N...]",
    )
    generator: Generator | Sequence[Generator] | None = option(
        None,
        "in place of seeds a torch.Generator, drawn from as it stands, for all images at once, or one per image; as "
        "diffusers' pipelines take it. Seeds are then reported as what it began with.",
    )
    variation_seed: int | Sequence[int] | None = option(
        None,
        "whose noise the start moves towards: one integer, counted up over the images while one integer seed stays as "
        "it is, or one per image; drawn and reported where not given.",
        flags=(),
        metavar="N[,N...]",
    )
    variation_strength: float = option(
        0.0,
        "how far it moves: 0 not at all, 1 all the way, in between on the arc that A1111 takes.",
        partial(check_number, low=0.0, high=1.0),
        flags=(),
        setting=True,
    )
    images_per_prompt: int = option(
        1, "images in a row for each prompt.", partial(check_integer, low=1), flags=("--count",), metavar="N"
    )
    image: Picture | Sequence[Picture] | None = option(
        None,
        "picture(s) to start from, PIL or (H, W, 3) arrays; turned as their EXIF orientation says.",
        flags=(),
        metavar="FILE|FOLDER",
    )
    strength: float = option(
        DEFAULT_STRENGTH,
        "share of the schedule that redraws image; above 0, at most 1.",
        partial(check_number, low=0.0, high=1.0),
        flags=(),
    )
    mask: Mask | Sequence[Mask] | None = option(
        None,
        "what of image to redraw, white or 1, and what to keep, black or 0: opaque PIL pictures or (H, W) arrays, one, "
        "one per prompt or one per image. Greys blend, except in inpainting models, which see them cut at one half. At "
        "strength 1 the picture starts from noise alone.",
        flags=(),
        metavar="FILE",
    )
    mask_blur: float = option(
        0.0,
        "standard deviation of a Gaussian that softens the mask, in the mask's pixels.",
        partial(check_number, low=0.0, high=1000.0),
        flags=(),
    )
    mask_padding: int | None = option(
        None,
        "draw what the mask marks and so many pixels around it alone, at height x width, the model's own where not "
        "given, and paste it into the picture, which keeps its size. Where not given, the whole picture is drawn.",
        partial(check_integer, low=0),
        optional=True,
        flags=(),
        metavar="N",
    )
    upscale: float = option(
        1.0,
        "factor on height and width: the picture is drawn in the size that is asked for, enlarged, and redrawn from "
        "there as from an image, with all that it was drawn with; 1 for no second pass.",
        partial(check_number, low=1.0, high=8.0),
        flags=(),
        setting=True,
    )
    upscale_strength: float = option(
        DEFAULT_UPSCALE_STRENGTH,
        "share of the schedule that redraws the enlarged picture; above 0, at most 1.",
        partial(check_number, low=0.0, high=1.0),
        flags=(),
        setting=True,
    )
    upscale_steps: int | None = option(
        None,
        "sampling steps of the second pass's whole schedule; steps where not given.",
        partial(check_integer, low=1),
        optional=True,
        flags=(),
        setting=True,
    )
    latents: Tensor | None = option(None, "unit-variance start noise (B, 4, h, w), in place of the seeds' own.")
    weighting: str = option(
        "a1111",
        'what (word:1.2) does: "a1111" multiplies the embedding and restores the mean of the whole prompt\'s, or of '
        "each chunk's; \"comfyui\" moves it away from the empty prompt's.",
        partial(check_choice, choices=WEIGHTINGS),
        flags=(),
        setting=True,
    )
    long_prompts: str = option(
        "chunk",
        'of prompts beyond 75 tokens: "chunk" encodes them in parts, as A1111 does, which the word BREAK ends too; '
        '"truncate" cuts them off with a warning; "error" refuses them.',
        partial(check_choice, choices=LONG_PROMPTS),
        flags=(),
        setting=True,
    )
    clip_skip: int = option(
        0,
        "how many of the text encoder's last layers to leave out, for both prompts, as diffusers counts them; A1111's "
        "Clip skip is one more.",
        partial(check_integer, low=0),
        flags=(),
        metavar="N",
        setting=True,
    )
    customization: Customization | Sequence[Customization | None] | None = option(
        None,
        "an Infusion, ICO or DCI for all images, or a list with one per image; None draws with the model as it is. "
        "Images with the same texts, seed and start share one foundation.",
    )
    control: Sequence[Control] = option(
        (), "ControlNets that act upon all images: a list of engine.Control(net, image), or one.", check_controls
    )
    image_prompts: ImagePrompts = option(
        None,
        "an engine.ImagePrompt, or a list of them that all act on every image beside its text; or a list with a list "
        "of them, or None, per image.",
    )
    attention_words: Sequence[str] = option(
        (),
        "words of every prompt whose attention maps to record, at the cost of copying them to the host at every step; "
        "see Result.attention.",
        _check_words,
    )
    record_masks: bool = option(False, "record the masks of DCI images; see Result.masks.", check_flag)
    output: str = option("pil", '"pil", "numpy" or "latent".', partial(check_choice, choices=_OUTPUTS))
    callback: Callback | None = option(
        None,
        "callback(step, total, latents) after every evaluation of the UNet, counted from 0; returning False cancels, "
        "and the result then has no images.",
        check_callable,
        optional=True,
    )
    callback_latents: str = option(
        "noisy",
        'what callback is given: "noisy" latents as they are after the step, or the "clean" ones that the model '
        "predicted in it, which make a preview.",
        partial(check_choice, choices=("noisy", "clean")),
    )
    progress: bool = option(True, "show a progress bar.", check_flag)
    vae_slicing: bool = option(
        False, "run the VAE image by image, with the same result and less memory.", check_flag, flags=(), setting=True
    )
    vae_tiling: bool = option(
        False,
        "run the VAE tile by tile, for large pictures; see AutoencoderKL.decode.",
        check_flag,
        flags=(),
        setting=True,
    )
    scheduler: Any = option(
        None, "an engine.Scheduler of this Engine, in whose batches to draw, beside other callers; None draws at once."
    )

    def __post_init__(self) -> None:
        check_options(self)
