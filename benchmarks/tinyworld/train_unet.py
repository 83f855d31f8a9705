"""Train the tinyworld text encoder and UNet: ``python -m benchmarks.tinyworld.train_unet --out RUNS --minutes 240``.

Epsilon prediction on SD v1.5's noise schedule, with min-SNR weighting (Hang et al. 2023, arXiv:2303.09556, gamma 5).
Two further terms tie words to things; see ``grounding``. Latents come from a store that grows while training runs:
every step encodes some new pictures and trains on a random draw from all so far, each time under a fresh caption.
Needs ``vae.pt`` (train_vae) and ``tokenizer`` in the folder.
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
from benchmarks.tinyworld.data import HELD_OUT_SEED, TRAIN_SEED, pictures_at, scene_at
from benchmarks.tinyworld.grounding import MAX_THINGS, Words, place_loss, read_words
from benchmarks.tinyworld.scene import Scene, silhouettes
from benchmarks.tinyworld.train_vae import VAE_CONFIG
from benchmarks.tinyworld.training import EMA, Optimizer, Run
from engine.backends.ops import TORCH
from engine.engine import Engine
from engine.kernels.cross_attention import cross_attention_ref
from engine.models.conditioning import Batch, Conditioning, Following
from engine.models.config import ScheduleConfig, UNetConfig, VAEConfig
from engine.models.unet import UNet2DConditionModel
from engine.models.vae import AutoencoderKL
from engine.observe.sheet import grid
from engine.sampling.schedule import alphas_cumprod
from engine.text.encoder import TextEncoder

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
_PLACE_WEIGHT, _MEANING_WEIGHT = 0.1, 0.5
_CAPTION_DROPOUT = 0.1
_SAMPLE_PROMPTS = 24
_FIRST_PICTURES = 4096


class LatentStore:
    """Scenes 0, 1, 2, ... in a file that grows: unscaled posterior means in float16, and where each thing is."""

    _RECORD = np.dtype([("latents", "<f2", (4, 16, 16)), ("covered", "u1", (MAX_THINGS, 16, 16))])

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        self.records = self._map()

    def __len__(self) -> int:
        return len(self.records)

    def grow(self, vae: AutoencoderKL, count: int) -> None:
        """Draw, encode and store the next ``count`` scenes."""
        fresh = _encode(vae, range(len(self), len(self) + count))
        with self.path.open("r+b") as file:
            file.seek(len(self) * self._RECORD.itemsize)  # over what a killed run may have left of a last record
            fresh.tofile(file)
        self.records = self._map()

    def take(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Latents (B, 4, 16, 16) and how much each thing covers (B, 2, 16, 16) in [0, 1], float32."""
        return _tensors(self.records[indices])

    def _map(self) -> np.ndarray:
        count = self.path.stat().st_size // self._RECORD.itemsize
        if count == 0:
            return np.empty(0, self._RECORD)
        return np.memmap(self.path, self._RECORD, "r", shape=(count,))


def _tensors(records: np.ndarray) -> tuple[Tensor, Tensor]:
    latents, covered = (torch.from_numpy(np.ascontiguousarray(records[name])) for name in ("latents", "covered"))
    return latents.float(), covered.float() / 255


@torch.no_grad()
def _encode(vae: AutoencoderKL, indices: range, seed: int = TRAIN_SEED) -> np.ndarray:
    records = np.zeros(len(indices), LatentStore._RECORD)
    with torch.autocast("cpu", torch.bfloat16):
        parts = [vae.encode(rows) for rows in pictures_at(indices, seed, patterned=True).split(32)]
    records["latents"] = torch.cat(parts).half().numpy()
    for record, index in zip(records, indices, strict=True):
        cells = silhouettes(scene_at(index, seed, patterned=True), 16)
        record["covered"][: len(cells)] = cells
    return records


def training_attention(q: Tensor, k: Tensor, v: Tensor, n_heads: int) -> Tensor:
    """Attention by two batched products: its backward pass in bfloat16 is 4x faster on a CPU than the fused one."""
    q, k, v = (x.unflatten(-1, (n_heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(dim=-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


class Trainee(torch.nn.Module):
    """The text encoder and the UNet as one module, with the factor that scales latents to unit variance."""

    scale: Tensor

    def __init__(self, vocabulary_size: int, end_of_text: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))
        ids: dict[str, Any] = {
            "vocab_size": vocabulary_size,
            "eos_token_id": end_of_text,
            "bos_token_id": end_of_text - 1,
        }
        config = CLIPTextConfig(**TEXT_CONFIG, **ids, pad_token_id=end_of_text)
        self.text = CLIPTextModel._from_config(config, attn_implementation="eager")
        self.unet = UNet2DConditionModel(
            UNetConfig.from_dict(UNET_CONFIG),
            replace(TORCH, attention=training_attention, cross_attention=cross_attention_ref),
        )

    def forward(
        self, words: Words, noisy: Tensor, timesteps: Tensor, isolated: Tensor
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Predict noise.

        Args:
            words: the captions.
            noisy: (B, 4, h, w) latents.
            timesteps: (B,).
            isolated: (B,) bool, the rows whose words see their own phrase alone.

        Returns:
            The noise, the columns of the nouns' maps per layer, and how far words are from meaning their own phrase.
        """
        whole = self.text(input_ids=words.ids).last_hidden_state
        alone = self.text(input_ids=words.ids, attention_mask=words.own_phrase).last_hidden_state
        text = self.unet.text_kv(torch.where(isolated[:, None, None], alone, whole))
        maps: list[Tensor] = []
        nobody = torch.empty(0, dtype=torch.int64)
        watched = Following(words.nouns, nobody, ())
        keep = lambda layer, out, columns: maps.append(columns)  # noqa: E731
        condition = Conditioning(Batch(text, watched), self.unet.time_shifts(timesteps), observe=keep)
        return self.unet.denoise(noisy, condition), maps, (whole - alone.detach()).square().mean()


class Task:
    """The training loss, on stored or held-out latents."""

    def __init__(self, model: Trainee, tokenizer: CLIPTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.alphas_cumprod = torch.from_numpy(alphas_cumprod(ScheduleConfig.from_dict(SCHEDULER_CONFIG))).float()

    def losses(
        self, records: tuple[Tensor, Tensor], captions: list[str], scenes: list[Scene], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Squared error of the noise, ``place`` and ``meaning``."""
        latents, covered = records
        words = read_words(self.tokenizer, captions, scenes)
        timesteps = torch.randint(0, 1000, (len(latents),), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        isolated = torch.rand(len(latents), generator=generator) < 0.5
        alpha_bar = self.alphas_cumprod[timesteps][:, None, None, None]
        noisy = alpha_bar.sqrt() * latents * self.model.scale + (1 - alpha_bar).sqrt() * noise
        with torch.autocast("cpu", torch.bfloat16):
            predicted, maps, meaning = self.model(words, noisy, timesteps, isolated)
        snr = alpha_bar / (1 - alpha_bar)
        weight = snr.clamp(max=_MIN_SNR_GAMMA) / snr
        error = (weight * (predicted.float() - noise).square()).mean()
        seen = alpha_bar[:, :, 0, 0] * words.named  # where a thing is cannot be told from noise
        return {"noise": error, "place": place_loss(maps, covered, seen), "meaning": meaning}


def train(folder: Path, minutes: float, batch: int, peak_rate: float, grow: int, init: Path | None) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(VAEConfig.from_dict(VAE_CONFIG))
    vae.load_state_dict(torch.load(folder / "vae.pt", weights_only=True)["ema"]["shadow"])
    vae.requires_grad_(False)
    store = LatentStore(folder / "latents.f16")
    if len(store) < _FIRST_PICTURES:
        store.grow(vae, _FIRST_PICTURES - len(store))
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    scale = 1 / float(store.take(list(range(_FIRST_PICTURES)))[0].std())
    model = Trainee(len(tokenizer), tokenizer.eos_token_id, scale)
    if init is not None:
        model.unet.load_state_dict(load_file(init / "unet/diffusion_pytorch_model.safetensors"))
        model.text.load_state_dict(load_file(init / "text_encoder/model.safetensors"))
    optimizer = Optimizer(model, weight_decay=0.01)
    ema = EMA(model, 0.999)
    run = Run(folder, "unet", minutes, {"model": model, "optimizer": optimizer, "ema": ema})
    task = Task(model, tokenizer)
    held_out = [scene_at(i, HELD_OUT_SEED, patterned=True) for i in range(256)]
    prompts = [full_prompt(scene) for scene in held_out]
    held_out_records = _tensors(_encode(vae, range(256), HELD_OUT_SEED))
    evaluations = 0
    while not run.finished:
        store.grow(vae, grow)
        rng = random.Random(run.step)
        indices = [rng.randrange(len(store)) for _ in range(batch)]
        scenes = [scene_at(i, patterned=True) for i in indices]
        captions = [caption(scene, rng) if rng.random() >= _CAPTION_DROPOUT else "" for scene in scenes]
        losses = task.losses(store.take(indices), captions, scenes, torch.Generator().manual_seed(run.step))
        (losses["noise"] + _PLACE_WEIGHT * losses["place"] + _MEANING_WEIGHT * losses["meaning"]).backward()
        optimizer.step(run.rate(peak_rate))
        ema.update(model)
        if run.advance(batch):
            with ema.applied(model), torch.no_grad():
                check = task.losses(held_out_records, prompts, held_out, torch.Generator().manual_seed(0))
                run.log(pictures=len(store), **{name: loss.item() for name, loss in check.items()})
                if evaluations % 4 == 0 or run.finished:
                    sample_sheet(model, vae, tokenizer, folder / f"unet-{run.step:06d}.png")
            evaluations += 1


def sample_sheet(model: Trainee, vae: AutoencoderKL, tokenizer: CLIPTokenizer, path: Path) -> None:
    """Draw held-out prompts with 25 DDIM steps at guidance 4."""
    vae.config = replace(vae.config, scaling_factor=float(model.scale))
    schedule = ScheduleConfig.from_dict(SCHEDULER_CONFIG)
    trainee = Engine("tinyworld", model.unet, vae, TextEncoder(tokenizer, model.text), schedule, TORCH)
    prompts = [full_prompt(scene_at(i, HELD_OUT_SEED, patterned=True)) for i in range(1000, 1000 + _SAMPLE_PROMPTS)]
    out = trainee.generate(prompts, steps=25, guidance_scale=4.0, seed=0, progress=False)
    grid(out.images, columns=6).save(path)
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
    arguments = parser.parse_args()
    train(arguments.out, arguments.minutes, arguments.batch, arguments.rate, arguments.grow, arguments.init)


if __name__ == "__main__":
    main()
