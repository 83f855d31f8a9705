"""What ``generate`` returns, and how it is saved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .observe.masks import BranchMasks
from .observe.word_maps import AttentionMaps
from .text.encoder import find_words
from .version import __version__

A1111_SAMPLERS = {
    "ddim": "DDIM",
    "pndm": "PLMS",
    "heun": "Heun",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_karras": "DPM++ 2M Karras",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "dpm2": "DPM2",
    "deis": "DEIS",
    "ddpm": "DDPM",
    "unipc": "UniPC",
    "lcm": "LCM",
    "tcd": "TCD",
}
A1111_SCHEDULES = {
    "karras": "Karras",
    "exponential": "Exponential",
    "beta": "Beta",
    "ays": "Align Your Steps",
    "sgm_uniform": "SGM Uniform",
}


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """Pictures and how they were made.

    Attributes:
        images: list of PIL pictures; for output "numpy" an array (B, H, W, 3) float32 in [0, 1]; for "latent" the
            latents. Empty if the request was cancelled.
        latents: (B, 4, h, w) float32 final latents, scaled as the UNet sees them.
        seeds: one per image.
        settings: the request as it was honoured, JSON-serialisable; pictures and latents given to it are not included.
        timings: seconds per stage ("text", "encode", "denoise", "decode", "total").
        foundation_images: for each image its foundation's picture, in the form of ``images``, or None where it has
            none; None if no image has one.
        attention: maps of the request's attention words, if it named some.
        masks: for each image the masks by which DCI mixed it, None where it did not; None if they were not asked for.
        cancelled: whether a callback ended the request early.
    """

    images: Any
    latents: Tensor
    seeds: list[int]
    settings: dict[str, Any]
    timings: dict[str, float]
    foundation_images: list[Any] | None = None
    attention: AttentionMaps | None = None
    masks: list[BranchMasks | None] | None = None
    cancelled: bool = False

    def png_info(self, i: int) -> PngInfo:
        """PNG text of image ``i``: A1111's ``parameters``, and everything as JSON under ``twinstream``."""
        info = PngInfo()
        info.add_itxt("parameters", self.parameters(i))
        info.add_itxt("twinstream", json.dumps(self._image_settings(i), ensure_ascii=False))
        return info

    def parameters(self, i: int) -> str:
        """The settings of image ``i`` as A1111 writes and reads them."""
        settings = self._image_settings(i)
        lines = [settings["prompt"]]
        if settings["negative_prompt"]:
            lines.append(f"Negative prompt: {settings['negative_prompt']}")
        values = {
            "Steps": settings["steps"],
            "Sampler": A1111_SAMPLERS[settings["sampler"]],
            **({"Schedule type": A1111_SCHEDULES[settings["schedule"]]} if settings["schedule"] else {}),
            "CFG scale": f"{settings['guidance_scale']:g}",
            "Seed": settings["seed"],
            "Size": f"{settings['width']}x{settings['height']}",
            "Model": settings["model"],
        }
        if settings["loras"]:
            values["LoRA"] = ", ".join(f"{lora['name']}:{lora['weight']:g}" for lora in settings["loras"])
        if settings["clip_skip"]:
            values["Clip skip"] = settings["clip_skip"] + 1
        if settings["strength"] is not None:
            values["Denoising strength"] = f"{settings['strength']:g}"
        if settings["mask_blur"]:
            values["Mask blur"] = f"{settings['mask_blur']:g}"
        if settings["mask_padding"] is not None:
            values |= {"Inpaint area": "Only masked", "Masked area padding": settings["mask_padding"]}
        values |= _second_pass(settings) | _variation(settings)
        if settings["eta"]:
            values["Eta DDIM"] = f"{settings['eta']:g}"
        if settings["customization"] is not None:
            custom = settings["customization"]
            if custom["method"] == "dci":
                names = "+".join(custom["concepts"]) or custom["noun"]
                values["DCI"] = f"{names} with {custom['auxiliary_noun']} {custom['strength']:g}"
            else:
                method = {"infusion": "Infusion", "ico": "ICO"}[custom["method"]]
                values[method] = "+".join(concept["name"] for concept in custom["concepts"])
        for number, one in enumerate(settings["control"]):
            steps = f"Guidance Start: {one['start']:g}, Guidance End: {one['end']:g}"
            mode = "ControlNet is more important" if one["guess_mode"] else "Balanced"
            values[f"ControlNet {number}"] = (
                f"Model: {one['name']}, Weight: {one['weight']:g}, {steps}, Control Mode: {mode}"
            )
        values["Version"] = f"twinstream {__version__}"
        return "\n".join([*lines, ", ".join(f"{name}: {_quoted(value)}" for name, value in values.items())])

    def save(self, folder: str | Path, stems: Sequence[str] | None = None) -> list[Path]:
        """Write the pictures as ``<number>-<seed>.png`` with their settings inside; nothing is overwritten.

        A foundation's picture goes beside its image as ``<number>-<seed>-foundation.png``. Numbers go on from the
        highest in the folder, which is created if need be. Returns the images' paths.

        Args:
            folder: where to.
            stems: other names, one per image, without ``.png``.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if stems is None:
            taken = [int(path.name[:5]) for path in folder.glob("[0-9][0-9][0-9][0-9][0-9]-*.png")]
            stems = [f"{max(taken, default=-1) + 1 + i:05d}-{seed}" for i, seed in enumerate(self.seeds)]
        if isinstance(self.images, Tensor):
            raise ValueError("latents cannot be saved as pictures; generate with output='pil'")
        paths = []
        for i, image in enumerate(self.images):
            paths.append(_write(folder / f"{stems[i]}.png", image, self.png_info(i)))
            foundation = self.foundation_images[i] if self.foundation_images else None
            if foundation is not None:
                plain = replace(self, settings=self.settings | {"customizations": [None] * len(self.seeds)})
                _write(folder / f"{stems[i]}-foundation.png", foundation, plain.png_info(i))
        return paths

    def _image_settings(self, i: int) -> dict[str, Any]:
        names = ("prompt", "negative_prompt", "seed", "variation_seed", "customization")
        per_image = {name: f"{name}s" for name in names} | {"image_prompts": "image_prompts"}
        shared = {name: value for name, value in self.settings.items() if name not in per_image.values()}
        own = {name: self.settings[many][i] for name, many in per_image.items()}
        words = find_words(f"{own['prompt']}\n{own['negative_prompt']}", dict.fromkeys(self.settings["embeddings"]))
        return own | shared | {"embeddings": sorted({word.group().lower() for word in words})}


def _second_pass(settings: dict[str, Any]) -> dict[str, Any]:
    """How A1111 tells an upscaled picture's second pass, whose steps it counts as those taken."""
    if settings["upscale"] == 1:
        return {}
    strength = settings["upscale_strength"]
    steps = int((settings["upscale_steps"] or settings["steps"]) * strength)
    own = "Denoising strength" if settings["strength"] is None else "Hires denoising strength"
    return {
        own: f"{strength:g}",
        "Hires upscale": f"{settings['upscale']:g}",
        "Hires steps": steps,
        "Hires upscaler": "Lanczos",
    }


def _variation(settings: dict[str, Any]) -> dict[str, Any]:
    if not settings["variation_strength"]:
        return {}
    strength = f"{settings['variation_strength']:g}"
    return {"Variation seed": settings["variation_seed"], "Variation seed strength": strength}


def _quoted(value: Any) -> str:
    """A value as A1111 writes it: in JSON's quotes where it would otherwise end early."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text


def _write(path: Path, image: Image.Image | np.ndarray, info: PngInfo) -> Path:
    picture = image if isinstance(image, Image.Image) else Image.fromarray((image * 255).round().astype(np.uint8))
    with path.open("xb") as file:
        picture.save(file, format="PNG", pnginfo=info)
    return path
