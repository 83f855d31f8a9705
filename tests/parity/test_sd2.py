"""Stable Diffusion 2's differences, from a diffusers folder: linear projections, heads by width, GELU, v-prediction."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

import engine
from tests.pipelines import SD_V1_5_SCHEDULER, make_pipeline, relative_error

_TOLERANCE = 2e-5
_SCHEDULER = {**SD_V1_5_SCHEDULER, "prediction_type": "v_prediction"}


def save_sd2(folder: Path, seed: int = 0) -> diffusers.StableDiffusionPipeline:
    pipeline = make_pipeline("narrow", seed)
    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        cross_attention_dim=32,
        block_out_channels=(24, 48),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        norm_num_groups=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        use_linear_projection=True,
        upcast_attention=True,
    ).eval()
    text = CLIPTextModel(
        CLIPTextConfig(**{**pipeline.text_encoder.config.to_dict(), "hidden_act": "gelu", "projection_dim": 16})
    ).eval()
    pipeline.register_modules(unet=unet, text_encoder=text, scheduler=diffusers.DDIMScheduler.from_config(_SCHEDULER))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(_SCHEDULER))
    return pipeline


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_pictures(tmp_path: Path, sampler: str, agrees) -> None:
    pipeline, sd = save_sd2(tmp_path), engine.load(tmp_path)
    assert sd.unet.config.n_heads == (2, 4)
    if sampler == "euler":
        pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(_SCHEDULER)
    generator = torch.Generator().manual_seed(3)
    expected = pipeline(
        "a red cat", negative_prompt="blurry", num_inference_steps=6, guidance_scale=7.5, generator=generator,
        output_type="latent",
    ).images  # fmt: skip
    out = sd.generate(
        "a red cat", negative_prompt="blurry", steps=6, guidance_scale=7.5, seed=3, sampler=sampler, output="latent",
        progress=False,
    )  # fmt: skip
    error = relative_error(out.latents, expected)
    agrees("Stable Diffusion 2's layout, small random model", "StableDiffusionPipeline", error, _TOLERANCE)


def test_a_whole_model_of_its_sizes_is_accepted() -> None:
    """The fields of SD 2.1's own unet/config.json that SD v1's lacks."""
    from engine.models.config import UNetConfig
    from tests.pipelines import SD_V1_5_UNET

    own = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}
    own |= {"upcast_attention": True, "dual_cross_attention": False, "only_cross_attention": False, "sample_size": 96}
    config = UNetConfig.from_dict(
        {**SD_V1_5_UNET, **own, "num_class_embeds": None, "mid_block_type": "UNetMidBlock2DCrossAttn"}
    )
    assert config.n_heads == (5, 10, 20, 20)
    assert config.cross_attention_dim == 1024
