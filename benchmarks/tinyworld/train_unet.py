"""Train the tinyworld text encoder and UNet: ``python -m benchmarks.tinyworld.train_unet --out RUNS --minutes 240``.

Epsilon prediction on SD v1.5's noise schedule, with min-SNR weighting (Hang et al. 2023, arXiv:2303.09556, gamma 5).
Latents come from a store that grows while training runs: every step encodes some new pictures and trains on a random
draw from all so far, each time under a fresh caption. Needs ``vae.pt`` (train_vae) and ``tokenizer`` in the folder.
"""

import argparse
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.tinyworld.captions import caption, full_prompt
from benchmarks.tinyworld.data import HELD_OUT_SEED, grid, pictures_at, scene_at, to_images
from benchmarks.tinyworld.train_vae import VAE_CONFIG
from benchmarks.tinyworld.training import EMA, Run
from engine.config import ScheduleConfig, UNetConfig, VAEConfig
from engine.denoise import denoise
from engine.ops import TORCH
from engine.samplers import make_table
from engine.schedule import alphas_cumprod
from engine.text import TextEncoder
from engine.unet import UNet2DConditionModel
from engine.vae import AutoencoderKL

UNET_CONFIG: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 16,
    "block_out_channels": [64, 96, 96, 64],
    "layers_per_block": 1,
    "attention_head_dim": [4, 6, 6, 4],
    "cross_attention_dim": 128,
    "norm_num_groups": 16,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
TEXT_CONFIG: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
SCHEDULER_CONFIG: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}
_MIN_SNR_GAMMA = 5.0
_CAPTION_DROPOUT = 0.1
_SAMPLE_PROMPTS = 24
_FIRST_PICTURES = 4096


class LatentStore:
    """Latents of scenes 0, 1, 2, ... in a file that grows; unscaled posterior means in float16."""

    def __init__(self, path: Path, vae: AutoencoderKL, capacity: int) -> None:
        self.vae, self.count = vae, 0
        mode = "r+" if path.exists() else "w+"
        self.latents = np.memmap(path, np.float16, mode, shape=(capacity, 4, 16, 16))
        filled = np.flatnonzero(np.any(self.latents.reshape(capacity, -1), axis=1))
        self.count = int(filled[-1]) + 1 if len(filled) else 0

    def grow(self, count: int) -> None:
        """Draw and encode the next ``count`` scenes; does nothing once the file is full."""
        stop = min(self.count + count, len(self.latents))
        if stop > self.count:
            self.latents[self.count : stop] = _encode(self.vae, range(self.count, stop)).numpy()
            self.count = stop

    def take(self, indices: list[int]) -> Tensor:
        return torch.from_numpy(self.latents[indices]).float()


@torch.no_grad()
def _encode(vae: AutoencoderKL, indices: range, seed: int = 0) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        latents = [vae.encode(rows) for rows in pictures_at(indices, seed).split(32)]
    return torch.cat(latents).half()


def training_attention(q: Tensor, k: Tensor, v: Tensor, n_heads: int) -> Tensor:
    """Attention by two batched products: its backward pass in bfloat16 is 4x faster on a CPU than the fused one."""
    q, k, v = (x.unflatten(-1, (n_heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(dim=-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


class Trainee(torch.nn.Module):
    """The text encoder and the UNet as one module."""

    def __init__(self, vocabulary_size: int, end_of_text: int) -> None:
        super().__init__()
        ids: dict[str, Any] = {
            "vocab_size": vocabulary_size,
            "eos_token_id": end_of_text,
            "bos_token_id": end_of_text - 1,
        }
        config = CLIPTextConfig(**TEXT_CONFIG, **ids, pad_token_id=end_of_text)
        self.text = CLIPTextModel._from_config(config, attn_implementation="eager")
        self.unet = UNet2DConditionModel(
            UNetConfig.from_dict(UNET_CONFIG), replace(TORCH, attention=training_attention)
        )

    def forward(self, ids: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return self.unet(noisy, timesteps, self.text(input_ids=ids).last_hidden_state)


class Task:
    """The training loss, on stored or held-out latents."""

    def __init__(self, model: Trainee, tokenizer: CLIPTokenizer, scale: float) -> None:
        self.model, self.tokenizer, self.scale = model, tokenizer, scale
        self.alphas_cumprod = torch.from_numpy(alphas_cumprod(ScheduleConfig.from_dict(SCHEDULER_CONFIG))).float()

    def loss(self, latents: Tensor, captions: list[str], generator: torch.Generator) -> Tensor:
        ids = self.tokenizer(
            captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        timesteps = torch.randint(0, 1000, (len(latents),), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        alpha_bar = self.alphas_cumprod[timesteps][:, None, None, None]
        noisy = alpha_bar.sqrt() * latents * self.scale + (1 - alpha_bar).sqrt() * noise
        with torch.autocast("cpu", torch.bfloat16):
            predicted = self.model(ids, noisy, timesteps)
        snr = alpha_bar / (1 - alpha_bar)
        weight = snr.clamp(max=_MIN_SNR_GAMMA) / snr
        return (weight * (predicted.float() - noise).square()).mean()


def train(
    folder: Path, minutes: float, batch: int, peak_rate: float, grow: int, capacity: int, init: Path | None
) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(VAEConfig.from_dict(VAE_CONFIG))
    vae.load_state_dict(torch.load(folder / "vae.pt", weights_only=True)["ema"]["shadow"])
    vae.requires_grad_(False)
    store = LatentStore(folder / "latents.f16", vae, capacity)
    store.grow(max(0, _FIRST_PICTURES - store.count))
    scale = 1 / float(store.take(list(range(2048))).std())
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    model = Trainee(len(tokenizer), tokenizer.eos_token_id)
    if init is not None:
        model.unet.load_state_dict(load_file(init / "unet/diffusion_pytorch_model.safetensors"))
        model.text.load_state_dict(load_file(init / "text_encoder/model.safetensors"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = EMA(model, 0.999)
    run = Run(folder, "unet", minutes, {"model": model, "optimizer": optimizer, "ema": ema})
    task = Task(model, tokenizer, scale)
    held_out = [scene_at(i, HELD_OUT_SEED) for i in range(256)]
    held_out_latents = _encode(vae, range(256), HELD_OUT_SEED).float()
    evaluations = 0
    while not run.finished:
        store.grow(grow)
        rng = random.Random(run.step)
        indices = [rng.randrange(store.count) for _ in range(batch)]
        captions = [caption(scene_at(i), rng) if rng.random() >= _CAPTION_DROPOUT else "" for i in indices]
        loss = task.loss(store.take(indices), captions, torch.Generator().manual_seed(run.step))
        for group in optimizer.param_groups:
            group["lr"] = run.rate(peak_rate)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(model)
        if run.advance(batch):
            with ema.applied(model), torch.no_grad():
                prompts = [full_prompt(scene) for scene in held_out]
                check = task.loss(held_out_latents, prompts, torch.Generator().manual_seed(0))
                run.log(loss=loss.detach(), held_out=check, pictures=float(store.count), scale=scale)
                if evaluations % 4 == 0 or run.finished:
                    sample_sheet(model, vae, tokenizer, scale, folder / f"unet-{run.step:06d}.png")
            evaluations += 1


def sample_sheet(model: Trainee, vae: AutoencoderKL, tokenizer: CLIPTokenizer, scale: float, path: Path) -> None:
    """Draw held-out prompts with 25 DDIM steps at guidance 4."""
    scenes = [scene_at(i, HELD_OUT_SEED) for i in range(1000, 1000 + _SAMPLE_PROMPTS)]
    prompts = [full_prompt(scene) for scene in scenes]
    context = TextEncoder(tokenizer, model.text).encode([""] * len(prompts) + prompts)
    table = make_table("ddim", ScheduleConfig.from_dict(SCHEDULER_CONFIG), 25)
    x = torch.randn(len(prompts), 4, 16, 16, generator=torch.Generator().manual_seed(0))
    x, _ = denoise(model.unet, table, x, context, 4.0, [], lambda i, latents: True)
    grid(to_images(vae.decode(x / scale)), columns=6).save(path)
    path.with_suffix(".txt").write_text("\n".join(prompts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder with vae.pt and tokenizer; all output goes here"
    )
    parser.add_argument("--minutes", type=float, default=240.0, help="length of the whole run, earlier parts included")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--grow", type=int, default=16, help="pictures drawn and encoded per step")
    parser.add_argument("--init", type=Path, help="diffusers folder whose weights a new run starts from")
    parser.add_argument("--capacity", type=int, default=120_000, help="pictures kept at most")
    arguments = parser.parse_args()
    train(
        arguments.out,
        arguments.minutes,
        arguments.batch,
        arguments.rate,
        arguments.grow,
        arguments.capacity,
        arguments.init,
    )


if __name__ == "__main__":
    main()
