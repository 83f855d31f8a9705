"""Pictures to latents and back through the VAE, within what numbers and memory allow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends.graphs import Graphs
from ..errors import NonFiniteError, OutOfMemoryError
from ..models.layers import place_convolutions
from ..models.tiny_vae import VAE, make_vae
from ..models.vae import AutoencoderKL
from ..warn import warn
from .out_of_memory import with_retry

_Part = Callable[[VAE, bool], tuple[Tensor, ...]]  # with slicing or not


class VAERunner:
    """Runs the VAE and checks what it gives.

    One that overflows in float16 is tried once more in float32, and one that runs out of memory picture by picture,
    which gives the same result; both with a warning.

    Args:
        vae: the model.
        graphs: where decoding is captured; None to run without.
        free: called when memory runs out.
    """

    def __init__(self, vae: VAE, graphs: Graphs | None, free: Callable[[], None]) -> None:
        self.vae, self.graphs, self.free = vae, graphs, free
        self.factor, self.latent_channels = vae.config.factor, vae.config.latent_channels
        self.is_random = isinstance(vae, AutoencoderKL)  # whether latents of a picture are drawn

    def posterior(self, images: Tensor, slicing: bool, tiling: bool) -> tuple[Tensor, Tensor]:
        """``AutoencoderKL.posterior``.

        Raises:
            NonFiniteError: the VAE produced NaN or infinity.
            OutOfMemoryError: not even one picture fits.
        """
        mean, std = self._run("encoder", slicing, tiling, lambda vae, sliced: vae.posterior(images, sliced, tiling))
        return mean, std

    def decode(self, latents: Tensor, slicing: bool, tiling: bool) -> Tensor:
        """``AutoencoderKL.decode``; raises as ``posterior`` does."""
        (decoded,) = self._run(
            "decoder", slicing, tiling, lambda vae, sliced: (self.pixels(vae, latents, sliced, tiling),)
        )
        return decoded

    def pixels(self, vae: VAE, latents: Tensor, slicing: bool, tiling: bool) -> Tensor:
        """``vae.decode`` without checks, through a graph where there are graphs and nothing is tiled."""
        if self.graphs is None or tiling or vae is not self.vae:
            return vae.decode(latents, slicing, tiling)
        graphs, name = self.graphs, f"VAE decoder, latents {latents.shape[2]}x{latents.shape[3]}"
        rows = latents.split(1) if slicing else [latents]
        return torch.cat([graphs(name, lambda _, row: vae.decode(row), None, row) for row in rows])

    def _run(self, part: str, slicing: bool, tiling: bool, run: _Part) -> tuple[Tensor, ...]:
        results = self._within_memory(part, self.vae, slicing, tiling, run)
        dtype = self.vae.weight.dtype
        if dtype == torch.float16 and not _all_finite(results):
            warn(f"the VAE {part} overflowed in float16; trying float32", RuntimeWarning)
            results = self._within_memory(part, self._in_float32(), slicing, tiling, run)
        if not _all_finite(results):
            raise NonFiniteError(f"the VAE {part} produced NaN or infinity in {dtype}; try dtype='float32'")
        return results

    def _in_float32(self) -> VAE:
        with torch.device("meta"):
            exact = make_vae(self.vae.config, self.vae.ops)
        weights = {name: weight.float() for name, weight in self.vae.state_dict().items()}
        exact.load_state_dict(weights, assign=True)
        place_convolutions(exact, self.vae.ops.name, self.vae.weight.device, benchmark=False)
        return exact

    def _within_memory(self, part: str, vae: VAE, slicing: bool, tiling: bool, run: _Part) -> tuple[Tensor, ...]:
        def free() -> None:
            self.free()
            warn(f"the VAE {part} ran out of memory; trying picture by picture", RuntimeWarning)

        try:
            return with_retry(lambda: run(vae, slicing), free, lambda: run(vae, True))
        except torch.OutOfMemoryError as error:
            shortage = error.with_traceback(None)  # which would keep the attempt's tensors
        self.free()
        advice = "smaller pictures" if tiling else "vae_tiling=True, or smaller pictures,"
        device = vae.weight.device
        rule = f"the memory of {device} must hold the VAE {part}'s work on one picture"
        raise OutOfMemoryError(f"{rule}, got too little; {advice} would fit") from shortage


def _all_finite(tensors: tuple[Tensor, ...]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
