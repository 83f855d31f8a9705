"""Slicing gives the same picture; tiling gives nearly the same one."""

import pytest
import torch

from engine.models.config import VAEConfig
from engine.models.vae import AutoencoderKL, blend_tiles
from tests.pipelines import make_vae


def _vae() -> AutoencoderKL:
    theirs = make_vae("narrow")
    vae = AutoencoderKL(VAEConfig.from_dict(theirs.config)).eval()
    vae.load_state_dict(theirs.state_dict())
    return vae


def test_tiles_cover_and_blend_exactly() -> None:
    """With a "decoder" that has no receptive field, tiles must blend to the whole picture exactly."""
    latents = torch.randn(2, 3, 150, 70)

    def decode(tile: torch.Tensor) -> torch.Tensor:
        assert max(tile.shape[2:]) <= 64
        return tile.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    whole = latents.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(blend_tiles(decode, latents, (1, 2)), whole)
    torch.testing.assert_close(blend_tiles(lambda tile: tile[..., ::2, ::2], whole, (2, 1)), latents)


@torch.no_grad()
@pytest.mark.parametrize("size", [(80, 100), (64, 64), (20, 70)], ids=str)
def test_tiling(size: tuple[int, int]) -> None:
    vae = _vae()
    latents = torch.randn(1, 4, *size)
    whole, tiled = vae.decode(latents), vae.decode(latents, tiling=True)
    assert tiled.shape == whole.shape
    if size == (64, 64):  # one tile
        torch.testing.assert_close(tiled, whole, rtol=1e-5, atol=1e-5)
    correlation = torch.corrcoef(torch.stack([tiled.flatten(), whole.flatten()]))[0, 1]
    assert correlation > 0.97
    jumps = (tiled[..., 1:, :] - tiled[..., :-1, :]).abs().amax(dim=(0, 1, 3))
    usual = (whole[..., 1:, :] - whole[..., :-1, :]).abs().amax(dim=(0, 1, 3))
    assert jumps.max() <= 1.5 * usual.max()  # no seams


@torch.no_grad()
def test_slicing_with_tiling() -> None:
    vae = _vae()
    latents = torch.randn(2, 4, 70, 20)
    both = vae.decode(latents, slicing=True, tiling=True)
    torch.testing.assert_close(both, vae.decode(latents, tiling=True), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_encoder_tiling() -> None:
    vae = _vae()
    images = torch.rand(2, 3, 180, 60) * 2 - 1
    whole, _ = vae.posterior(images)
    tiled, std = vae.posterior(images, slicing=True, tiling=True)
    assert tiled.shape == std.shape == whole.shape == (2, 4, 90, 30)
    assert torch.corrcoef(torch.stack([tiled.flatten(), whole.flatten()]))[0, 1] > 0.97
