"""Small random Stable Diffusion pipelines, made by diffusers and saved as its folders."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import engine
from engine.weights.checkpoint import EMBEDDED_MODEL

SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}
# our sampler's name: diffusers' scheduler, and what distinguishes it
# SD v1.5's own file, as it lies in its repository: silent on timestep_spacing
_SD_V1_5_SCHEDULER_TEXT = (Path(__file__).parent / "parity" / "sd_v1_5_scheduler_config.json").read_text()
SD_V1_5_SCHEDULER: dict[str, Any] = json.loads(_SD_V1_5_SCHEDULER_TEXT)
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "ddpm": (diffusers.DDPMScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_sde": (diffusers.DPMSolverSDEScheduler, {}),
    "dpm2": (diffusers.KDPM2DiscreteScheduler, {}),
    "deis": (diffusers.DEISMultistepScheduler, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {}),
    "tcd": (diffusers.TCDScheduler, {}),
}
_ATTENTION_DOWN, _PLAIN_DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
_ATTENTION_UP, _PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"

# name: UNet and VAE sizes that differ in width, depth, heads, groups and placement of attention
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "sd_like": {
        "unet": {
            "block_out_channels": (32, 64, 64, 64),
            "layers_per_block": 2,
            "attention_head_dim": 8,
            "norm_num_groups": 32,
            "down_block_types": (_ATTENTION_DOWN,) * 3 + (_PLAIN_DOWN,),
            "up_block_types": (_PLAIN_UP,) + (_ATTENTION_UP,) * 3,
        },
        "vae": {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 2, "norm_num_groups": 32},
    },
    "narrow": {
        "unet": {
            "block_out_channels": (24, 48),
            "layers_per_block": 1,
            "attention_head_dim": 3,
            "norm_num_groups": 12,
            "down_block_types": (_ATTENTION_DOWN, _PLAIN_DOWN),
            "up_block_types": (_PLAIN_UP, _ATTENTION_UP),
        },
        "vae": {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4},
    },
    "deep_heads_per_block": {
        "unet": {
            "block_out_channels": (16, 32, 48),
            "layers_per_block": 3,
            "attention_head_dim": (2, 4, 6),
            "norm_num_groups": 8,
            "transformer_layers_per_block": 2,
            "down_block_types": (_PLAIN_DOWN, _ATTENTION_DOWN, _ATTENTION_DOWN),
            "up_block_types": (_ATTENTION_UP, _ATTENTION_UP, _PLAIN_UP),
        },
        "vae": {"block_out_channels": (16, 32, 32), "layers_per_block": 3, "norm_num_groups": 8},
    },
}

SD_V1_5_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "norm_num_groups": 32,
    "down_block_types": [_ATTENTION_DOWN] * 3 + [_PLAIN_DOWN],
    "up_block_types": [_PLAIN_UP] + [_ATTENTION_UP] * 3,
    "sample_size": 64,
}


def make_unet(shape: str, text_width: int = 32, seed: int = 0, in_channels: int = 4) -> diffusers.UNet2DConditionModel:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"in_channels": in_channels, "cross_attention_dim": text_width, **SHAPES[shape]["unet"]}
    return diffusers.UNet2DConditionModel(sample_size=8, **sizes).eval()


def make_vae(shape: str, seed: int = 0) -> diffusers.AutoencoderKL:
    torch.manual_seed(seed)
    sizes = SHAPES[shape]["vae"]
    n = len(sizes["block_out_channels"])
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * n, up_block_types=("UpDecoderBlock2D",) * n, **sizes
    ).eval()


def make_pipeline(shape: str, seed: int = 0, in_channels: int = 4) -> diffusers.StableDiffusionPipeline:
    """A whole pipeline with random weights and the embedded model's tokenizer; inpainting models have nine channels."""
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED_MODEL / "tokenizer")
    torch.manual_seed(seed)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).eval()
    return diffusers.StableDiffusionPipeline(
        vae=make_vae(shape, seed + 1),
        text_encoder=text,
        tokenizer=tokenizer,
        unet=make_unet(shape, seed=seed + 2, in_channels=in_channels),
        scheduler=diffusers.DDIMScheduler.from_config(SD_V1_5_SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_pipeline(
    shape: str, folder: Path, seed: int = 0, in_channels: int = 4, **options: Any
) -> diffusers.StableDiffusionPipeline:
    """Make a pipeline, save it in ``folder``, with SD v1.5's own scheduler file, and return it."""
    pipeline = make_pipeline(shape, seed, in_channels)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder, **options)
    (folder / "scheduler" / "scheduler_config.json").write_text(_SD_V1_5_SCHEDULER_TEXT)
    return pipeline


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@torch.no_grad()
def encode(pipeline: Any, prompt: str) -> torch.Tensor:
    """A diffusers pipeline's encoded text (1, 77, E)."""
    ids = pipeline.tokenizer(
        prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    return pipeline.text_encoder(ids)[0]


def random_concept(sd: engine.Engine, seed: int = 0) -> engine.Concept:
    """A text-space Infusion concept of a cat, of unit normal residuals."""
    generator = torch.Generator().manual_seed(seed)
    widths = {name: attn2.to_v.in_features for name, attn2 in sd.unet.cross_attentions.items()}
    return engine.Concept("cat", {name: torch.randn(width, generator=generator) for name, width in widths.items()})
