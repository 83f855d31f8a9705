"""Train a ControlNet on tinyworld's outlines: ``python -m benchmarks.tinyworld.train_controlnet --out runs/outlines``.

The embedded model stays as it is; a copy of its UNet's way down learns to follow the edges of pictures (Zhang et al.
2023, arXiv:2302.05543): plain noise prediction, half of the captions empty, so that the hint has to tell what they do
not. A run that was stopped goes on. The result, ``<out>/net``, is a diffusers folder; ``<out>/outlines-*.png`` shows
hints, what the model draws without the net, and with it.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import engine
from benchmarks.tinyworld.captions import caption, full_prompt
from benchmarks.tinyworld.data import HELD_OUT_SEED, TRAIN_SEED, pictures_at, scene_at, to_images
from benchmarks.tinyworld.train_unet import training_attention
from benchmarks.tinyworld.training import EMA, Optimizer, Run
from engine.backends.ops import TORCH
from engine.models.conditioning import Batch, Conditioning
from engine.models.controlnet import ControlNetConfig, ControlNetModel
from engine.models.unet import UNet2DConditionModel
from engine.observe.sheet import grid
from engine.train.denoising import Noiser, differentiable
from engine.weights.checkpoint import EMBEDDED_MODEL

HINT_CHANNELS = (16, 24, 32, 48)
_EDGE = 0.3  # of neighbouring values in [-1, 1]
_NEAR = 2  # pixels between an edge that was asked for and one that was drawn
_CAPTION_DROPOUT = 0.5
_FIRST_PICTURES, _MOST_PICTURES = 512, 8192
_SHOWN = 6


def outlines(pictures: Tensor) -> Tensor:
    """Where pictures (B, 3, H, W) in [-1, 1] change from a pixel to the next: (B, 3, H, W) of 0 and 1, all alike."""
    right = F.pad((pictures[..., 1:] - pictures[..., :-1]).abs(), (0, 1))
    below = F.pad((pictures[..., 1:, :] - pictures[..., :-1, :]).abs(), (0, 0, 0, 1))
    edges = torch.maximum(right, below).amax(dim=1, keepdim=True) > _EDGE
    return edges.float().expand(-1, 3, -1, -1).contiguous()


def agreement(pictures: Tensor, hints: Tensor) -> float:
    """F1 of the edges of pictures and those asked for, where two pixels of distance do not count."""
    drawn, asked = outlines(pictures)[:, :1], hints[:, :1]
    near = [F.max_pool2d(edges, 2 * _NEAR + 1, 1, _NEAR) for edges in (drawn, asked)]
    recall = float((asked * near[0]).sum() / asked.sum().clamp(min=1))
    precision = float((drawn * near[1]).sum() / drawn.sum().clamp(min=1))
    return 2 * precision * recall / max(precision + recall, 1e-9)


def new_controlnet(unet: UNet2DConditionModel, hint_channels: tuple[int, ...] = HINT_CHANNELS) -> ControlNetModel:
    """A copy of a UNet's way down that adds nothing yet, for training."""
    net = ControlNetModel(ControlNetConfig(unet.config, hint_channels), replace(TORCH, attention=training_attention))
    own, copied = net.state_dict(), unet.state_dict()
    net.load_state_dict({name: copied.get(name, weight).clone() for name, weight in own.items()})
    for conv in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        for parameter in conv.parameters():
            torch.nn.init.zeros_(parameter)
    return net


def save_controlnet(net: ControlNetModel, folder: Path) -> None:
    """As a diffusers folder in float16, of a copy of the embedded model's UNet."""
    config = json.loads((EMBEDDED_MODEL / "unet" / "config.json").read_text())
    for name in ("up_block_types", "out_channels", "sample_size"):
        del config[name]
    config["_class_name"] = "ControlNetModel"
    config["conditioning_embedding_out_channels"] = list(net.control.hint_channels)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    weights = {name: weight.detach().half().contiguous() for name, weight in net.state_dict().items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})


class Pictures:
    """Scenes 0, 1, 2, ... as scaled latents and outlines, drawn when first asked for."""

    def __init__(self, sd: engine.Engine) -> None:
        self.sd = sd
        self.latents, self.edges = torch.empty(0, 4, 16, 16), torch.empty(0, 1, 128, 128, dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.latents)

    @torch.no_grad()
    def grow_to(self, count: int) -> None:
        for first in range(len(self), min(count, _MOST_PICTURES), 32):
            pictures = pictures_at(range(first, min(first + 32, count, _MOST_PICTURES)), TRAIN_SEED, patterned=True)
            latents = self.sd.vae.encode(pictures) * self.sd.vae.config.scaling_factor
            self.latents = torch.cat([self.latents, latents])
            self.edges = torch.cat([self.edges, outlines(pictures)[:, :1] > 0])

    def take(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Latents (B, 4, 16, 16) and hints (B, 3, 128, 128)."""
        return self.latents[indices], self.edges[indices].float().expand(-1, 3, -1, -1)


def loss(
    net: ControlNetModel,
    unet: UNet2DConditionModel,
    context: Tensor,
    hints: Tensor,
    latents: Tensor,
    noiser: Noiser,
    seed: int,
) -> Tensor:
    """Squared error of the noise that the frozen UNet predicts with what the net adds."""
    noised = noiser(latents, torch.Generator().manual_seed(seed))
    with torch.autocast("cpu", torch.bfloat16):
        added = net(noised.latents, noised.timesteps, context, hints)
        condition = Conditioning(Batch(unet.text_kv(context)), unet.time_shifts(noised.timesteps), residuals=(added,))
        predicted = unet.denoise(noised.latents, condition)
    return F.mse_loss(predicted.float(), noised.noise)


@torch.no_grad()
def check(
    sd: engine.Engine, folder: Path, path: Path | None, count: int = _SHOWN, steps: int = 25
) -> tuple[float, float]:
    """Draw held-out scenes by their prompts without and with the saved net; how nearly edges agree with the hints."""
    net = engine.load_controlnet(folder, sd)
    pictures = pictures_at(range(count), HELD_OUT_SEED, patterned=True)
    hints = outlines(pictures)
    prompts = [full_prompt(scene_at(i, HELD_OUT_SEED, patterned=True)) for i in range(count)]
    controls = [(), engine.Control(net, list(hints.permute(0, 2, 3, 1).numpy()))]
    drawn = [
        sd.generate(prompts, control=control, steps=steps, guidance_scale=4.0, seed=0, output="numpy", progress=False)
        for control in controls
    ]
    tensors = [torch.from_numpy(np.asarray(one.images)).permute(0, 3, 1, 2) * 2 - 1 for one in drawn]
    if path is not None:
        grid([image for one in (hints * 2 - 1, *tensors) for image in to_images(one)], columns=count).save(path)
    before, after = (agreement(one, hints) for one in tensors)
    return before, after


def train(folder: Path, minutes: float, batch: int, peak_rate: float, grow: int, most_steps: int | None = None) -> None:
    torch.manual_seed(0)
    sd = engine.load(device="cpu", dtype="float32")
    unet = differentiable(sd.unet, gradient_checkpointing=False)
    net = new_controlnet(unet)
    ema = EMA(net, 0.995)
    run = Run(folder, "controlnet", minutes, {"net": net, "optimizer": (optimizer := Optimizer(net, 0.01)), "ema": ema})
    pictures, noiser = Pictures(sd), Noiser(sd)
    while not run.finished and (most_steps is None or run.step < most_steps):
        pictures.grow_to(_FIRST_PICTURES + grow * run.step if most_steps is None else batch)
        rng = random.Random(run.step)
        indices = [rng.randrange(len(pictures)) for _ in range(batch)]
        scenes = [scene_at(i, TRAIN_SEED, patterned=True) for i in indices]
        with torch.no_grad():
            context = sd.encode_prompt([caption(s, rng) if rng.random() >= _CAPTION_DROPOUT else "" for s in scenes])
        latents, hints = pictures.take(indices)
        error = loss(net, unet, context, hints, latents, noiser, run.step)
        error.backward()
        optimizer.step(run.rate(peak_rate))
        ema.update(net)
        if run.advance(batch):
            run.log(pictures=len(pictures), noise=float(error))
    with ema.applied(net):
        save_controlnet(net, folder / "net")
    before, after = check(
        sd, folder / "net", folder / f"outlines-{run.step:06d}.png", *([] if most_steps is None else [1, 2])
    )
    run.log(edges_without=before, edges_with=after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; all output goes here")
    parser.add_argument("--minutes", type=float, default=30.0, help="length of the whole run, earlier parts included")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--grow", type=int, default=4, help="pictures drawn and encoded per step")
    parser.add_argument("--most-steps", type=int, help="stop after so many steps, for trying out")
    arguments = parser.parse_args()
    train(arguments.out, arguments.minutes, arguments.batch, arguments.rate, arguments.grow, arguments.most_steps)


if __name__ == "__main__":
    main()
