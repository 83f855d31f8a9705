"""Nodes of ComfyUI that draw with Twinstream: copy or link this file into ComfyUI's folder ``custom_nodes``.

Twinstream must be installed where ComfyUI runs (``pip install twinstream``). The nodes stand under "Twinstream".
Pictures go in and out as ComfyUI's IMAGE: (B, H, W, 3) float in 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import engine
from engine.loading import BACKENDS
from engine.methods.lora import asked_lora
from engine.sampling.schedule import SCHEDULES

try:
    from comfy.model_management import InterruptProcessingException, processing_interrupted
    from comfy.utils import ProgressBar
except ImportError:  # outside ComfyUI, as in tests
    ProgressBar = None

_ENGINE, _CONCEPTS, _CUSTOM = "TWINSTREAM_ENGINE", "TWINSTREAM_CONCEPTS", "TWINSTREAM_CUSTOMIZATION"
_TEXT = ("STRING", {"default": "", "multiline": True})
_LINE = ("STRING", {"default": ""})
_OWN = "model's own"


def _number(default: float, low: float, high: float, step: float = 0.05) -> tuple[str, dict[str, float]]:
    return "FLOAT", {"default": default, "min": low, "max": high, "step": step}


def _whole(default: int, low: int, high: int, step: int = 1, **more: Any) -> tuple[str, dict[str, Any]]:
    return "INT", {"default": default, "min": low, "max": high, "step": step, **more}


class LoadEngine:
    """A diffusers folder or ``.safetensors`` file; an empty path is the embedded model."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        kinds = ["automatic", "float32", "bfloat16", "float16"]
        loras = ("STRING", {"default": "", "multiline": True, "tooltip": "one a line: file, or file:weight"})
        return {
            "required": {"model": _LINE, "dtype": (kinds,), "backend": (list(BACKENDS),)},
            "optional": {"vae": _LINE, "loras": loras},
        }

    RETURN_TYPES, RETURN_NAMES = (_ENGINE,), ("engine",)
    FUNCTION, CATEGORY = "load", "Twinstream"

    def load(self, model: str, dtype: str, backend: str, vae: str = "", loras: str = "") -> tuple[Any]:
        files = [asked_lora(line.strip()) for line in loras.splitlines() if line.strip()]
        kind = None if dtype == "automatic" else dtype
        return (engine.load(model or None, dtype=kind, backend=backend, vae=vae or None, loras=files),)


class LoadConcept:
    """A concept file, behind those that come in."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"file": _LINE}, "optional": {"concepts": (_CONCEPTS,)}}

    RETURN_TYPES, RETURN_NAMES = (_CONCEPTS,), ("concepts",)
    FUNCTION, CATEGORY = "load", "Twinstream"

    @classmethod
    def IS_CHANGED(cls, file: str, **_: Any) -> int:  # noqa: N802
        path = Path(file)
        return path.stat().st_mtime_ns if path.is_file() else 0

    def load(self, file: str, concepts: tuple[Any, ...] = ()) -> tuple[Any]:
        return ((*concepts, engine.Concept.load(file)),)


class Infusion:
    """Infusion concepts, drawn under the foundation's attention maps."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        required = {"concepts": (_CONCEPTS,), "strength": _number(1.0, -10.0, 10.0)}
        return {"required": required | {"foundation": (["parallel", "shared"],)}}

    RETURN_TYPES, RETURN_NAMES = (_CUSTOM,), ("customization",)
    FUNCTION, CATEGORY = "make", "Twinstream"

    def make(self, concepts: tuple[Any, ...], strength: float, foundation: str) -> tuple[Any]:
        return (engine.Infusion(list(concepts), strength=strength, foundation=foundation),)


class ICO:
    """Concepts of tokens, keys and values; prompts write their placeholders."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"concepts": (_CONCEPTS,)}}

    RETURN_TYPES, RETURN_NAMES = (_CUSTOM,), ("customization",)
    FUNCTION, CATEGORY = "make", "Twinstream"

    def make(self, concepts: tuple[Any, ...]) -> tuple[Any]:
        return (engine.ICO(list(concepts)),)


class DCI:
    """Two branches in the first steps: of a noun of the prompt, or of the first of some ICO concepts."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        auxiliary = ("STRING", {"default": "", "tooltip": "empty: another noun of its category"})
        required = {"noun": _LINE, "auxiliary_noun": auxiliary, "strength": _number(1.0, -10.0, 10.0)}
        return {"required": required | {"fraction": _number(0.15, 0.0, 1.0)}, "optional": {"concepts": (_CONCEPTS,)}}

    RETURN_TYPES, RETURN_NAMES = (_CUSTOM,), ("customization",)
    FUNCTION, CATEGORY = "make", "Twinstream"

    def make(
        self, noun: str, auxiliary_noun: str, strength: float, fraction: float, concepts: tuple[Any, ...] = ()
    ) -> tuple[Any]:
        if bool(noun) == bool(concepts):
            raise ValueError(f"give a noun or ICO concepts, one of the two, got noun={noun!r} and {len(concepts)}")
        of = list(concepts) or noun
        return (engine.DCI(of, auxiliary_noun or None, strength=strength, fraction=fraction),)


class Generate:
    """Draw pictures: from nothing, or from those that come in.

    Outputs the pictures and, for Infusion with a parallel foundation, what the model draws by itself; elsewhere the
    pictures again.
    """

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        size = {"tooltip": "0: the model's own, or the incoming picture's"}
        return {
            "required": {
                "engine": (_ENGINE,),
                "prompt": _TEXT,
                "negative_prompt": _TEXT,
                "seed": _whole(0, 0, 2**64 - 1, control_after_generate=True),
                "steps": _whole(50, 1, 1000),
                "guidance_scale": _number(8.0, 1.0, 100.0, 0.1),
                "sampler": (list(engine.SAMPLERS),),
                "schedule": ([_OWN, *SCHEDULES],),
                "width": _whole(0, 0, 4096, 8, **size),
                "height": _whole(0, 0, 4096, 8, **size),
                "images": _whole(1, 1, 64),
            },
            "optional": {
                "customization": (_CUSTOM,),
                "image": ("IMAGE",),
                "strength": _number(0.8, 0.01, 1.0, 0.01),
                "upscale": _number(1.0, 1.0, 4.0),
                "upscale_strength": _number(0.5, 0.01, 1.0, 0.01),
            },
        }

    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "IMAGE"), ("images", "foundations")
    FUNCTION, CATEGORY = "draw", "Twinstream"

    def draw(
        self,
        engine: Any,
        schedule: str,
        width: int,
        height: int,
        images: int,
        image: torch.Tensor | None = None,
        strength: float = 0.8,
        upscale: float = 1.0,
        upscale_strength: float = 0.5,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        options |= {
            "width": width or None,
            "height": height or None,
            "schedule": None if schedule == _OWN else schedule,
        }
        if image is not None:
            options |= {"image": [np.asarray(one.cpu(), dtype=np.float32) for one in image], "strength": strength}
        if upscale != 1:
            options |= {"upscale": upscale, "upscale_strength": upscale_strength}
        watch = {"callback": _watching(), "progress": ProgressBar is None}
        out = engine.generate(images_per_prompt=images, output="numpy", **options, **watch)
        if out.cancelled:
            raise InterruptProcessingException
        foundations = out.foundation_images or [None] * images
        bases = [own if base is None else base for own, base in zip(out.images, foundations, strict=True)]
        return torch.from_numpy(out.images), torch.from_numpy(np.stack(bases))


def _watching() -> Callable[[int, int, torch.Tensor], bool] | None:
    """Moves ComfyUI's progress bar, and stops where its user says so."""
    if ProgressBar is None:
        return None
    bars: list[Any] = []

    def watch(step: int, total: int, _latents: torch.Tensor) -> bool:
        if not bars:
            bars.append(ProgressBar(total))
        bars[0].update_absolute(step + 1, total)
        return not processing_interrupted()

    return watch


NODE_CLASS_MAPPINGS = {
    f"Twinstream{one.__name__}": one for one in (LoadEngine, LoadConcept, Infusion, ICO, DCI, Generate)
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "TwinstreamLoadEngine": "Load Engine",
    "TwinstreamLoadConcept": "Load Concept",
    "TwinstreamInfusion": "Infusion",
    "TwinstreamICO": "ICO",
    "TwinstreamDCI": "DCI",
    "TwinstreamGenerate": "Generate",
}
