"""Configs are read exactly, or refused by name."""

import pytest

from engine.models.config import ScheduleConfig, UNetConfig, VAEConfig
from tests.pipelines import SD_V1_5_SCHEDULER, SD_V1_5_UNET

_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "sample_size": 512,
}


def test_sd15_sizes() -> None:
    unet, vae = UNetConfig.from_dict(SD_V1_5_UNET), VAEConfig.from_dict(_VAE)
    assert unet.n_heads == (8, 8, 8, 8)
    assert unet.down_has_attention == (True, True, True, False)
    assert (vae.factor, vae.scaling_factor, vae.norm_num_groups) == (8, 0.18215, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dual_cross_attention": True}, "dual_cross_attention must be False"),
        ({"act_fn": "gelu"}, "act_fn must be 'silu'"),
        ({"class_embed_type": "timestep"}, "class_embed_type must be None"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "down_block_types must hold only"),
        ({"up_block_types": ["CrossAttnUpBlock2D"] * 4}, "must mirror"),
        ({"block_out_channels": [320, 640, 1280]}, "block_out_channels must hold 4"),
        ({"block_out_channels": [320, 640, 1280, 1000]}, "multiples of norm_num_groups = 32, got 1000"),
        ({"attention_head_dim": 7}, "multiples of attention_head_dim = 7, got 320"),
        ({"cross_attention_dim": None}, "cross_attention_dim is missing"),
        ({"layers_per_block": 0}, "layers_per_block must be an integer >= 1, got 0"),
        ({"layers_per_block": [1, 2, 2, 2]}, "layers_per_block must be an integer"),
        ({"addition_time_embed_dim": 256}, "addition_time_embed_dim = 256 is not part of"),
    ],
    ids=str,
)
def test_unet_refusals(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_dict({**SD_V1_5_UNET, **change})


def test_fields_that_are_off_are_accepted() -> None:
    config = UNetConfig.from_dict({**SD_V1_5_UNET, "some_new_field": None, "another": False, "num_attention_heads": 4})
    assert config.n_heads == (4, 4, 4, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_quant_conv": False}, "use_quant_conv must be True"),
        ({"shift_factor": 0.1}, "shift_factor"),
        ({"scaling_factor": -1}, "scaling_factor must be a positive number, got -1"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 3}, "as many as"),
    ],
    ids=str,
)
def test_vae_refusals(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VAEConfig.from_dict({**_VAE, **change})


def test_schedule_where_the_file_is_silent() -> None:
    schedule = ScheduleConfig.from_dict({"trained_betas": [0.1, 0.2], "num_train_timesteps": 2})
    assert (schedule.timestep_spacing, schedule.set_alpha_to_one) == (None, None)
    assert (schedule.steps_offset, schedule.skip_prk_steps) == (0, False)
    with pytest.raises(ValueError, match="beta_start is missing"):
        ScheduleConfig.from_dict({"beta_end": 0.012, "beta_schedule": "scaled_linear"})


def test_schedule_without_a_file_is_sd15s_own() -> None:
    assert ScheduleConfig() == ScheduleConfig.from_dict(SD_V1_5_SCHEDULER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr needs prediction_type"),
        ({"use_lu_lambdas": True}, "use_lu_lambdas must be False"),
        ({"algorithm_type": "sde-dpmsolver++"}, "algorithm_type must be 'dpmsolver"),
        ({"final_sigmas_type": "sigma_min"}, "final_sigmas_type must be 'zero'"),
        ({"sigma_max": 10.0}, "sigma_max must be None"),
        ({"prediction_type": "flow"}, "prediction_type must be one of epsilon"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule must be one of"),
    ],
    ids=str,
)
def test_schedule_refusals(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleConfig.from_dict({**SD_V1_5_SCHEDULER, **change})


def test_unet_where_the_file_is_silent_has_diffusers_two_layers_a_block() -> None:
    silent = {name: value for name, value in SD_V1_5_UNET.items() if name != "layers_per_block"}
    assert UNetConfig.from_dict(silent).layers_per_block == 2
