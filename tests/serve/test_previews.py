"""What a server's previews are made of."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import engine
from engine.serve.http.previews import Previews
from engine.serve.http.run import ServeOptions, serve
from engine.serve.http.service import Limits, Service
from engine.serve.http.shelf import Shelf
from engine.weights.tiny_vae_file import read_tiny_decoder
from tests.parity.test_tiny_vae import make_tiny, original_decoder
from tests.pipelines import relative_error


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


def test_a_server_watches_what_the_model_predicts(small: engine.Engine, tmp_path: Path) -> None:
    tiny, path = make_tiny(), tmp_path / "taesd.safetensors"
    save_file(original_decoder(tiny), path)
    expected = []
    options = {"steps": 3, "seed": 4}
    small.generate(
        "a cat",
        callback=lambda _i, _n, latents: expected.append(latents[0].clone()),
        callback_latents="clean",
        progress=False,
        **options,
    )

    async def last(service: Service) -> torch.Tensor:
        entry = await service.start("a cat", options, client="")
        while not entry.job.done():
            await asyncio.sleep(0.01)
        assert entry.latents is not None
        return entry.latents

    with engine.Scheduler(small, max_rows=4) as scheduler:
        service = Service(scheduler, Shelf(small, tmp_path, tmp_path), Limits(), read_tiny_decoder(path, small.vae))
        latents = asyncio.run(last(service))
        assert relative_error(latents, expected[-1]) <= 1e-5
        noisy = small.generate("a cat", output="latent", progress=False, **options).latents[0]
        assert relative_error(noisy, expected[-1]) > 1e-4, "DDIM ends a little before"
        preview = np.asarray(service.previews.picture(latents), dtype=float)
    with torch.no_grad():
        theirs = (tiny.decode(expected[-1][None]).sample[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0) * 255
    assert np.abs(preview - theirs.numpy()).max() <= 1


def test_a_decoder_that_does_not_fit_ends_the_server_before_it_begins(small: engine.Engine, tmp_path: Path) -> None:
    with pytest.raises(engine.CheckpointError, match=r"a TAESD must be a .safetensors file; there is none"):
        serve(small, ServeOptions(preview_vae=tmp_path / "none.safetensors"), ())
