"""What a server's previews are made of."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import engine
from engine.serve.http.previews import Previews
from engine.weights.tiny_vae_file import read_tiny_decoder
from tests.parity.test_tiny_vae import make_tiny, original_decoder


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@torch.no_grad()
def test_a_decoder_draws_them(small: engine.Engine, tmp_path: Path, layout: str) -> None:
    tiny, path = make_tiny(), tmp_path / "taesd.safetensors"
    tensors = original_decoder(tiny) if layout == "original" else tiny.state_dict()
    save_file({name: one.contiguous() for name, one in tensors.items()}, path)
    latents = torch.randn(4, 5, 6)
    picture = Previews(small.vae, read_tiny_decoder(path, small.vae)).picture(latents)
    expected = (tiny.decode(latents[None]).sample[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)
    assert picture.size == (12, 10)
    assert np.abs(np.asarray(picture) / 255 - expected.numpy()).max() <= 0.6 / 255


@torch.no_grad()
def test_a_linear_map_does_without(small: engine.Engine) -> None:
    """Smooth latents come out as the VAE has them on the whole, which others do not."""
    previews = Previews(small.vae)
    torch.manual_seed(1)
    latents = torch.randn(4, 1, 1).expand(4, 8, 8)
    decoded = small.vae.decode(latents[None] / small.vae.config.scaling_factor)[0]
    expected = (decoded / 2 + 0.5).clamp(0, 1).mean(dim=(1, 2)).numpy()
    picture = np.asarray(previews.picture(latents)) / 255
    assert picture.shape == (16, 16, 3)
    assert np.abs(picture.mean(axis=(0, 1)) - expected).max() < 0.1
