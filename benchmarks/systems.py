"""The systems that benchmarks compare, as a guided UNet step, a VAE decode and a whole picture each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

import engine
from engine.unet import Conditioning

STEPS, GUIDANCE = 20, 7.5
_PROMPT = "a photo of a red cat on a beach"
_TIMESTEP = 481


@dataclass(frozen=True, slots=True)
class System:
    """One implementation with a loaded model; every case returns its result, for the error beside the time."""

    name: str
    cases: dict[str, Callable[[], Tensor]]


def twinstream(folder: Path, dtype: torch.dtype) -> System:
    """This engine, as ``generate`` drives it: text keys and values and time embeddings are projected ahead."""
    sd = engine.load(folder, dtype=dtype, device="cpu")
    latents, context = _inputs(sd.encode_prompt(["", _PROMPT]), sd.unet.config.sample_size)
    with torch.no_grad():
        shifts = tuple(shift.expand(2, -1) for shift in sd.unet.time_shifts(torch.tensor([_TIMESTEP])))
        condition = Conditioning(shifts, sd.unet.text_kv(context))
    rows, unscaled = torch.cat([latents, latents]).to(dtype), (latents / sd.vae.config.scaling_factor).to(dtype)

    def guided_step() -> Tensor:
        return _guide(sd.unet.denoise(rows, condition))

    def generate() -> Tensor:
        out = sd.generate(_PROMPT, steps=STEPS, guidance_scale=GUIDANCE, seed=0, output="numpy", progress=False)
        return torch.from_numpy(out.images)

    return System(
        "twinstream",
        {"guided_step": guided_step, "vae_decode": lambda: sd.vae.decode(unscaled), f"generate_{STEPS}": generate},
    )


def diffusers_eager(folder: Path, dtype: torch.dtype) -> System:
    """diffusers as its users run it on a CPU: SDPA attention, channels-last weights."""
    pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    encoded = pipeline.encode_prompt(_PROMPT, "cpu", 1, True, negative_prompt="")
    latents, context = _inputs(torch.cat([encoded[1], encoded[0]]), pipeline.unet.config.sample_size)
    rows, unscaled = torch.cat([latents, latents]).to(dtype), (latents / pipeline.vae.config.scaling_factor).to(dtype)

    def guided_step() -> Tensor:
        return _guide(pipeline.unet(rows, _TIMESTEP, context).sample)

    def generate() -> Tensor:
        images = pipeline(
            _PROMPT,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
        return torch.from_numpy(np.asarray(images))

    return System(
        "diffusers_eager",
        {
            "guided_step": guided_step,
            "vae_decode": lambda: pipeline.vae.decode(unscaled).sample,
            f"generate_{STEPS}": generate,
        },
    )


def _inputs(context: Tensor, size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(0)), context


def _guide(noise_pred: Tensor) -> Tensor:
    unconditional, conditional = noise_pred.float().chunk(2)
    return unconditional + GUIDANCE * (conditional - unconditional)


def full_size_folder(folder: Path) -> Path:
    """A diffusers folder of SD v1.5's sizes with random weights, written once; about 4.3 GB in float32."""
    if (folder / "model_index.json").exists():
        return folder
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from engine.checkpoint import ASSETS

    torch.manual_seed(0)
    attention_down, attention_up = ("CrossAttnDownBlock2D",) * 3, ("CrossAttnUpBlock2D",) * 3
    unet = diffusers.UNet2DConditionModel(
        sample_size=64,
        cross_attention_dim=768,
        attention_head_dim=8,
        down_block_types=(*attention_down, "DownBlock2D"),
        up_block_types=("UpBlock2D", *attention_up),
    )
    sizes: dict[str, Any] = {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    vae = diffusers.AutoencoderKL(**sizes)
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline: Any = diffusers.StableDiffusionPipeline
    pipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=CLIPTokenizer.from_pretrained(ASSETS / "clip"),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder
