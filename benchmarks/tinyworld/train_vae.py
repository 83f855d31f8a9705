"""Train the tinyworld autoencoder: ``python -m benchmarks.tinyworld.train_vae --out RUNS --minutes 45``.

Loss: squared and absolute error of the reconstruction, with a small KL term that keeps the latents compact.
``--decoder-only`` goes on with the encoder frozen, so that latents, and a UNet trained on them, stay valid.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.tinyworld.data import HELD_OUT_SEED, pictures_at, to_images
from benchmarks.tinyworld.evaluate import psnr_db, reconstruct
from benchmarks.tinyworld.training import EMA, Optimizer, Run
from engine.models.config import VAEConfig
from engine.models.vae import AutoencoderKL
from engine.observe.sheet import grid

VAE_CONFIG: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [16, 32, 64, 96],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "act_fn": "silu",
    "sample_size": 128,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_KL_WEIGHT = 1e-4
_L1_WEIGHT = 0.2


def train(folder: Path, minutes: float, batch: int, peak_rate: float, decoder_only: bool, init: Path | None) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(VAEConfig.from_dict(VAE_CONFIG))
    if init is not None:
        vae.load_state_dict(load_file(init / "vae/diffusion_pytorch_model.safetensors"))
    optimizer = Optimizer(vae, weight_decay=1e-3)
    ema = EMA(vae, 0.998)
    run = Run(folder, "vae", minutes, {"model": vae, "optimizer": optimizer, "ema": ema})
    if decoder_only:
        vae.load_state_dict(ema.shadow)
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    held_out = pictures_at(range(96), HELD_OUT_SEED, patterned=True)
    while not run.finished:
        generator = torch.Generator().manual_seed(run.step)
        pictures = pictures_at(range(run.samples, run.samples + batch), patterned=True)
        with torch.autocast("cpu", torch.bfloat16):
            mean, std = vae.posterior(pictures)
            noise = torch.randn(mean.shape, generator=generator)
            decoded = vae.decode(mean + std * noise)
        error = decoded.float() - pictures
        kl = 0.5 * (mean.float().square() + std.float().square() - 1 - 2 * std.float().log()).mean()
        loss = error.square().mean() + _L1_WEIGHT * error.abs().mean() + _KL_WEIGHT * kl
        loss.backward()
        optimizer.step(run.rate(peak_rate))
        ema.update(vae)
        if run.advance(batch):
            with ema.applied(vae):
                decoded = reconstruct(vae, held_out)
                run.log(loss=loss.item(), kl=kl.item(), std=mean.std().item(), psnr_db=psnr_db(decoded, held_out))
                _sheet(held_out[:24], decoded[:24], folder / "vae.png")


def _sheet(pictures: Tensor, decoded: Tensor, path: Path) -> None:
    """Originals beside their reconstructions."""
    pairs = itertools.chain.from_iterable(zip(to_images(pictures), to_images(decoded), strict=True))
    grid(list(pairs), columns=8).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, log and sample sheet")
    parser.add_argument("--minutes", type=float, default=45.0, help="length of the whole run, earlier parts included")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--decoder-only", action="store_true")
    parser.add_argument("--init", type=Path, help="diffusers folder whose weights a new run starts from")
    arguments = parser.parse_args()
    train(arguments.out, arguments.minutes, arguments.batch, arguments.rate, arguments.decoder_only, arguments.init)


if __name__ == "__main__":
    main()
