"""Diffusers' text-to-image and image-to-image pipelines by name and signature: calls of ``Engine.generate``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..engine import Engine
from ..result import Result
from ..sampling.arguments import Options
from ..sampling.pictures import to_pictures
from .adapters import lora_scale
from .base import Pipeline

OnStep = Callable[[Any, int, Tensor, dict[str, Any]], Mapping[str, Any]]
Generators = torch.Generator | Sequence[torch.Generator] | None

_OUTPUTS = {"pil": "pil", "np": "numpy", "pt": "numpy", "latent": "latent"}
_REFUSED = {  # arguments of a call, and why they cannot be honoured
    "timesteps": "steps are laid out by the scheduler",
    "sigmas": "noise levels are laid out by the scheduler",
    "prompt_embeds": "pictures are drawn from texts here; give prompt",
    "negative_prompt_embeds": "pictures are drawn from texts here; give negative_prompt",
    "ip_adapter_image": "this pipeline has no IP-Adapter",
    "ip_adapter_image_embeds": "this pipeline has no IP-Adapter",
    "callback": "it is deprecated in diffusers; give callback_on_step_end",
    "callback_steps": "it is deprecated in diffusers; give callback_on_step_end",
}
_MARK = re.compile(r"([\\()\[\]])")


class PipelineOutput(NamedTuple):
    """What a pipeline returns.

    Attributes:
        images: PIL pictures; an array (B, H, W, 3) float32 in [0, 1] for output_type "np"; a tensor (B, 3, H, W) for
            "pt"; latents (B, 4, h, w) for "latent".
        nsfw_content_detected: None: no safety checker runs here.
    """

    images: Any
    nsfw_content_detected: None = None


class StableDiffusionPipeline(Pipeline):
    """Text to image."""

    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        *,
        guidance_scale: float = 7.5,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: OnStep | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **others: Any,
    ) -> PipelineOutput | tuple[Any, None]:
        """Draw; arguments and results are those of diffusers' class of this name.

        Args:
            cross_attention_kwargs: ``{"scale": s}``, the factor on LoRAs; nothing else.
            callback_on_step_end: ``callback(pipe, i, timestep, {"latents": ...})``. It may look, and set
                ``pipe._interrupt`` to end the run with what there is; changed latents are refused.
            others: refused, with the reason.

        Raises:
            ValueError: an argument cannot be honoured.
        """
        given = {
            "height": height,
            "width": width,
            "latents": latents,
            "guidance_rescale": guidance_rescale,
            "steps": num_inference_steps,
            "eta": eta,
        }
        _refuse(others)
        watched = _Watching(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        drawing = _Drawing(self, prompt, negative_prompt, num_images_per_prompt, lora_scale(cross_attention_kwargs))
        return drawing.draw(given, guidance_scale, generator, clip_skip, output_type, return_dict, watched)


class StableDiffusionImg2ImgPipeline(Pipeline):
    """Image to image."""

    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Any,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        *,
        guidance_scale: float = 7.5,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: OnStep | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **others: Any,
    ) -> PipelineOutput | tuple[Any, None]:
        """Redraw PIL pictures, one for all or one per prompt; otherwise as ``StableDiffusionPipeline``.

        Raises:
            ValueError: an argument cannot be honoured.
        """
        given = {"image": image, "strength": strength, "steps": num_inference_steps, "eta": eta}
        _refuse(others)
        pictures = image if isinstance(image, list | tuple) else [image]
        if not all(isinstance(picture, Image.Image) for picture in pictures):
            kinds = ", ".join(sorted({type(picture).__name__ for picture in pictures}))
            raise ValueError(f"image must be PIL pictures here, got {kinds}")
        if len(pictures) > 1 and num_images_per_prompt > 1:
            rule = "num_images_per_prompt must be 1 with several images, which diffusers hands to other prompts"
            raise ValueError(f"{rule}; repeat prompt and image instead, got {num_images_per_prompt}")
        watched = _Watching(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        drawing = _Drawing(self, prompt, negative_prompt, num_images_per_prompt, lora_scale(cross_attention_kwargs))
        return drawing.draw(given, guidance_scale, generator, clip_skip, output_type, return_dict, watched)


class _Watching:
    """A ``callback_on_step_end`` as ``generate`` calls one."""

    def __init__(self, pipeline: Pipeline, callback: OnStep | None, tensors: Sequence[str]) -> None:
        if list(tensors) != ["latents"]:
            rule = "callback_on_step_end_tensor_inputs must be ['latents']: what else there is belongs to a batch"
            raise ValueError(f"{rule}, got {list(tensors)}")
        self.pipeline, self.callback = pipeline, callback
        self.timesteps: Callable[[], Tensor] = torch.Tensor
        pipeline._interrupt = False

    def __call__(self, step: int, _total: int, latents: Tensor) -> bool:
        assert self.callback is not None
        before = latents._version
        answer = self.callback(self.pipeline, step, self.timesteps()[step], {"latents": latents})
        if not isinstance(answer, Mapping):
            raise ValueError(f"callback_on_step_end must return its tensors in a dict, got {answer!r}")
        if answer.get("latents", latents) is not latents or latents._version != before:
            raise ValueError("callback_on_step_end must leave latents as they are: steps are not to be changed here")
        return not self.pipeline._interrupt


class _Drawing:
    """One call's texts, and the Engine that draws them."""

    def __init__(self, pipeline: Pipeline, prompt: Any, negative: Any, per_prompt: int, scale: float) -> None:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list | tuple) or not all(isinstance(text, str) for text in prompts):
            raise ValueError(f"prompt must be a text or a list of texts, got {prompt!r}")
        negatives = negative or ""
        if isinstance(negatives, str):
            negatives = [negatives] * len(prompts)
        self.pipeline, self.sd = pipeline, pipeline._engine_on_schedule(scale)
        self.n_images, self.per_prompt = len(prompts) * per_prompt, per_prompt
        custom = None
        if len(negatives) == len(prompts):  # else generate says so
            custom = pipeline._tokens.customizations(prompts, negatives)
        self.custom = custom and [one for one in custom for _ in range(per_prompt)]
        self.texts = {"prompt": _literal(prompts), "negative_prompt": _literal(negatives)}

    def draw(
        self,
        given: dict[str, Any],
        guidance_scale: float,
        generator: Generators,
        clip_skip: int | None,
        output_type: str,
        return_dict: bool,
        watched: _Watching,
    ) -> PipelineOutput | tuple[Any, None]:
        if output_type not in _OUTPUTS:
            raise ValueError(f"output_type must be one of {', '.join(_OUTPUTS)}, got {output_type!r}")
        sampling, output = self.pipeline._sampling, _OUTPUTS[output_type]
        options: dict[str, Any] = given | {
            "images_per_prompt": self.per_prompt,
            "guidance_scale": max(1.0, guidance_scale),  # diffusers has none below, either
            "sampler": sampling.sampler,
            "schedule": sampling.schedule,
            "generator": _generators(generator, self.sd.device),
            "customization": self.custom,
            "output": output,
            "progress": self.pipeline._progress,
            "clip_skip": clip_skip or 0,
            "long_prompts": "truncate",
        }
        if not (output == "latent" and "image" not in given):
            options |= self.pipeline._vae_options
        if watched.callback is not None:
            watched.timesteps = partial(_timesteps, self.sd, options)
            options["callback"] = watched
        out = self.sd.generate(**self.texts, **options)
        images = self._interrupted(out, output) if out.cancelled else out.images
        if output_type == "pt":
            images = torch.from_numpy(images).permute(0, 3, 1, 2)
        return PipelineOutput(images) if return_dict else (images, None)

    @torch.no_grad()
    def _interrupted(self, out: Result, output: str) -> Any:
        """The pictures of latents as they are."""
        return to_pictures(self.sd._vae, Options(output=output, **self.pipeline._vae_options), out.latents)


def _refuse(others: Mapping[str, Any]) -> None:
    for name, value in others.items():
        if name not in _REFUSED:
            raise ValueError(f"{name} is no argument of this pipeline here")
        if value is not None:
            raise ValueError(f"{name} must not be given: {_REFUSED[name]}")


def _literal(texts: Sequence[Any]) -> list[Any]:
    """Texts whose brackets mean themselves, as in diffusers, which knows no weights."""
    return [_MARK.sub(r"\\\1", text) if isinstance(text, str) else text for text in texts]


def _generators(given: Generators, device: torch.device) -> Any:
    """What noise is drawn from; torch's own for the device where nothing is given."""
    if given is not None:
        return given
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def _timesteps(sd: Engine, options: Mapping[str, Any]) -> Tensor:
    """Those that the UNet is told in this call."""
    steps = options["steps"]
    begin = steps - int(steps * options["strength"]) if "image" in options else 0
    return sd.timetables(options["sampler"], steps, options["eta"], begin, options["schedule"]).table.timesteps
