"""UNet, VAE and text encoder against diffusers and transformers, on random small models of several shapes."""

import pytest
import torch

import engine
from engine.backends.native import levels, native_ops
from engine.models.config import UNetConfig, VAEConfig
from engine.models.unet import UNet2DConditionModel
from engine.models.vae import AutoencoderKL
from tests.pipelines import SHAPES, make_unet, make_vae, relative_error, save_pipeline

_TOLERANCE = 2e-5


# no level of one position: there a group is two numbers, and diffusers itself errs by 1e-3 where they are close
@pytest.mark.parametrize("size", [(16, 16), (24, 16), (9, 11)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_unet(shape: str, size: tuple[int, int], agrees) -> None:
    theirs = make_unet(shape)
    ours = UNet2DConditionModel(UNetConfig.from_dict(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict())
    sample, context = torch.randn(3, 4, *size), torch.randn(3, 77, 32)
    timesteps = torch.tensor([0, 481, 999])
    expected = theirs(sample, timesteps, context).sample
    error = relative_error(ours(sample, timesteps, context), expected)
    agrees("UNet, small random models", "UNet2DConditionModel", error, _TOLERANCE)
    assert relative_error(ours(sample, 481, context)[1:2], expected[1:2]) <= _TOLERANCE


@pytest.mark.skipif(not levels(), reason="native kernels are not built here")
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_convolutions_by_minimal_filtering(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 3x3 ones of stride 1, however few their positions and channels."""
    monkeypatch.setattr("engine.backends.native.is_filtering_faster", lambda *_: True)
    theirs, their_vae = make_unet(shape), make_vae(shape)
    ours = UNet2DConditionModel(UNetConfig.from_dict(theirs.config), native_ops()).eval().requires_grad_(False)
    vae = AutoencoderKL(VAEConfig.from_dict(their_vae.config), native_ops()).eval().requires_grad_(False)
    for model, their_model in ((ours, theirs), (vae, their_vae)):
        model.load_state_dict(their_model.state_dict())
        model.to(memory_format=torch.channels_last)
    sample, context = torch.randn(2, 4, 9, 11), torch.randn(2, 77, 32)
    expected = theirs(sample, 481, context).sample
    assert relative_error(ours(sample, 481, context), expected) <= _TOLERANCE
    expected = their_vae.decode(sample).sample
    assert relative_error(vae.decode(sample), expected) <= 5e-5


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_vae(shape: str, agrees) -> None:
    theirs = make_vae(shape)
    ours = AutoencoderKL(VAEConfig.from_dict(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict())
    images, latents = torch.rand(3, 3, 48, 32) * 2 - 1, torch.randn(3, 4, 5, 8)
    posterior = theirs.encode(images).latent_dist
    mean, std = ours.posterior(images)
    assert relative_error(mean, posterior.mean) <= _TOLERANCE
    assert relative_error(std, posterior.std) <= _TOLERANCE
    error = relative_error(ours.encode(images), posterior.mean)
    agrees("VAE encoder, small random models", "AutoencoderKL", error, _TOLERANCE)
    expected = theirs.decode(latents).sample
    error = relative_error(ours.decode(latents), expected)
    agrees("VAE decoder, small random models", "AutoencoderKL", error, _TOLERANCE)
    assert relative_error(ours.decode(latents, slicing=True), expected) <= _TOLERANCE


def test_text(tmp_path, agrees) -> None:
    pipeline = save_pipeline("narrow", tmp_path)
    prompts = ["a photo of a red cat", "", "zebra " * 90]
    expected = pipeline.encode_prompt(prompts, "cpu", 1, False)[0]
    with pytest.warns(UserWarning, match="cut off"):
        actual = engine.load(tmp_path).encode_prompt(prompts, long_prompts="truncate")
    agrees("text encoder", "StableDiffusionPipeline.encode_prompt", relative_error(actual, expected), _TOLERANCE)
