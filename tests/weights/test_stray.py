"""What single files hold beside a model."""

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import engine
from engine.weights import ldm
from tests.pipelines import save_pipeline
from tests.weights.test_ldm import write_single_file

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    folder = tmp_path_factory.mktemp("stray")
    save_pipeline("sd_like", folder / "folder")
    write_single_file(folder / "folder", folder / "x.safetensors")
    return load_file(folder / "x.safetensors")


def _load(tensors: Tensors, path: Path) -> engine.Engine:
    save_file({name: one.contiguous() for name, one in tensors.items()}, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return engine.load(path)


def _same(sd: engine.Engine, other: engine.Engine) -> bool:
    pairs = ((one.unet.state_dict(), one.vae.state_dict(), one.text_encoder.model.state_dict()) for one in (sd, other))
    return all(torch.equal(a[name], b[name]) for a, b in zip(*pairs, strict=True) for name in a)


def test_leftovers_are_left_unread(tensors: Tensors, tmp_path: Path) -> None:
    """EMA, schedules, the trainer's state, CLIP's head, positions of any type, and all of it under state_dict."""
    expected = _load(tensors, tmp_path / "x.safetensors")
    more = {
        "model_ema.diffusion_modelinput_blocks00weight": torch.full((2, 2), torch.nan),
        "model_ema.num_updates": torch.tensor(3),
        "betas": torch.ones(3),
        "sqrt_recipm1_alphas_cumprod": torch.ones(3),
        "posterior_mean_coef1": torch.ones(3),
        "logvar": torch.ones(3),
        "scale_factor": torch.tensor(0.18),
        "global_step": torch.tensor(470000),
        "first_stage_model.loss.logvar": torch.ones(1),
        "cond_stage_model.logit_scale": torch.ones(1),
        "cond_stage_model.transformer.text_projection.weight": torch.ones(2, 2),
    }
    assert _same(_load(tensors | more, tmp_path / "more.safetensors"), expected)
    for dtype in (torch.float16, torch.float32, torch.bfloat16, torch.int32):
        positions = {f"{ldm.TEXT_PREFIXES[0]}embeddings.position_ids": torch.arange(77)[None].to(dtype)}
        assert _same(_load(tensors | positions, tmp_path / "positions.safetensors"), expected)
    without = {name: one for name, one in tensors.items() if "position_ids" not in name and "model_ema" not in name}
    assert _same(_load(without, tmp_path / "without.safetensors"), expected)
    nested = {f"state_dict.{name}": one for name, one in (tensors | more).items()}
    assert _same(_load(nested, tmp_path / "nested.safetensors"), expected)


def test_half_precision(tensors: Tensors, tmp_path: Path) -> None:
    """A pruned file in float16 with its EMA, some of which is in float32."""
    half = {name: one.half() if one.is_floating_point() else one for name, one in tensors.items()}
    sd = _load(half | {"model_ema.decay": torch.tensor(0.9999)}, tmp_path / "half.safetensors")
    expected = {
        name: one.half().float() for name, one in _load(tensors, tmp_path / "x.safetensors").unet.state_dict().items()
    }
    assert all(torch.equal(one, expected[name]) for name, one in sd.unet.state_dict().items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "lora_unet_mid_block.lora_up.weight",
            "lora_unet_mid_block.lora_up.weight is of a LoRA: take it out, and give",
        ),
        ("bundle_emb.bad.string_to_param.*", r"is of an embedding: take it out, and import it as a concept"),
        ("emb_params", "is of an embedding"),
        ("control_model.zero_convs.0.0.weight", "is of a ControlNet"),
        ("ip_adapter.1.to_k_ip.weight", "is of an IP-Adapter: take it out, and load it with engine.IPAdapter"),
        ("cond_stage_model.model.positional_embedding", "this is Stable Diffusion 2; load its diffusers folder"),
        ("conditioner.embedders.0.x", "this is SDXL, which is not supported"),
        ("model.diffusion_model.double_blocks.0.x", "this is FLUX"),
        ("first_stage_model.extra.weight", "unexpected first_stage_model.extra.weight"),
        ("cond_stage_model.transformer.extra", "unexpected cond_stage_model.transformer.extra"),
        ("model.diffusion_model.extra", "unexpected model.diffusion_model.extra"),
    ],
)
def test_what_would_change_pictures_is_refused(tensors: Tensors, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(engine.CheckpointError, match=message):
        _load(tensors | {name: torch.ones(2)}, tmp_path / "x.safetensors")


def test_what_nobody_knows_is_told(tensors: Tensors, tmp_path: Path) -> None:
    save_file(tensors | {f"what.{i}": torch.ones(1) for i in range(5)}, tmp_path / "x.safetensors")
    with pytest.warns(UserWarning, match=r"left unread, as no part of SD v1: what.0, what.1, what.2 and 2 more"):
        engine.load(tmp_path / "x.safetensors")


def test_averages_alone(tensors: Tensors, tmp_path: Path) -> None:
    """Neither those nor a file with some of the UNet missing loads in part."""
    prefix = "model.diffusion_model."
    averages = {
        f"model_ema.{name.removeprefix('model.').replace('.', '')}" if name.startswith(prefix) else name: one
        for name, one in tensors.items()
    }
    with pytest.raises(engine.CheckpointError, match="it holds their moving averages alone"):
        _load(averages, tmp_path / "x.safetensors")
    missing = f"{prefix}middle_block.0.in_layers.0.weight"
    partly = {name: one for name, one in tensors.items() if name != missing}
    with pytest.raises(engine.CheckpointError, match=f"missing {missing}"):
        _load(partly, tmp_path / "x.safetensors")


def test_marks_of_v_prediction(tensors: Tensors, tmp_path: Path) -> None:
    assert _load(tensors, tmp_path / "x.safetensors").schedule.prediction_type == "epsilon"
    marked = tensors | {"v_pred": torch.zeros(0)}
    schedule = _load(marked, tmp_path / "v.safetensors").schedule
    assert (schedule.prediction_type, schedule.rescale_betas_zero_snr) == ("v_prediction", False)
    schedule = _load(marked | {"ztsnr": torch.zeros(0)}, tmp_path / "z.safetensors").schedule
    assert (schedule.prediction_type, schedule.rescale_betas_zero_snr) == ("v_prediction", True)
