"""What people bring beside a model, with the methods: ``python -m benchmarks.tinyworld.combined --net FOLDER``.

On the embedded model: a LoRA of a style, trained here with peft on diffusers' UNet, under Infusion; a prompt of two
chunks under DCI; and a ControlNet of ``train_controlnet`` with ICO, inside of a mask. What was trained lies in
``--out`` and is not trained again. Writes ``docs/combined.png``.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import engine
from benchmarks.study_page import DOCS
from benchmarks.tinyworld.captions import caption
from benchmarks.tinyworld.concepts import reference_pictures
from benchmarks.tinyworld.data import TRAIN_SEED, pictures_at, scene_at, to_images, to_tensor
from benchmarks.tinyworld.scene import Scene, Thing, draw, silhouettes
from benchmarks.tinyworld.sweeps import TUNED_ICO
from benchmarks.tinyworld.train_controlnet import outlines
from engine.train.denoising import Noiser
from engine.weights.checkpoint import ASSETS, EMBEDDED_MODEL

PAGE = DOCS / "combined.png"
LONG = (
    "a photo of a beach, a picture of a sunny beach at the sea, on the beach, a ball on the beach, a photo of a beach "
    "with a ball, a beach at the sea, on a beach, a picture of the beach with a ball in the middle, a sunny beach, at "
    "the sea, a photo of a beach on a sunny day, with a ball, BREAK a photo of a {} on a beach with a ball"
)
_BATCH, _RATE, _RANK, _LORA_WEIGHT = 8, 2e-3, 8, 0.5
_SIDE, _GAP, _LINE, _FONT_PX = 128, 8, 18, 12


def inked(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] with thick black outlines, likewise."""
    edges = F.max_pool2d(outlines(pictures), 3, 1, 1)
    return pictures * (1 - edges) - edges


def train_lora(path: Path, steps: int) -> Path:
    """A LoRA in diffusers' layout under which everything has thick outlines, by captions that do not say so."""
    import diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    torch.manual_seed(0)
    sd = engine.load(device="cpu", dtype="float32")
    net = diffusers.UNet2DConditionModel.from_pretrained(EMBEDDED_MODEL / "unet", torch_dtype=torch.float32)
    net.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    net.add_adapter(LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=targets))
    noiser, optimizer = Noiser(sd), torch.optim.AdamW([one for one in net.parameters() if one.requires_grad], _RATE)
    for step in range(steps):
        rng, indices = random.Random(step), range(step * _BATCH, (step + 1) * _BATCH)
        with torch.no_grad():
            pictures = inked(pictures_at(indices))
            latents = sd.vae.encode(pictures) * sd.vae.config.scaling_factor
            context = sd.encode_prompt([caption(scene_at(i, TRAIN_SEED), rng) for i in indices])
        noised = noiser(latents, torch.Generator().manual_seed(step))
        predicted = net(noised.latents, noised.timesteps, encoder_hidden_states=context).sample
        loss = F.mse_loss(predicted, noised.noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    path.parent.mkdir(parents=True, exist_ok=True)
    weights: Any = get_peft_model_state_dict(net)
    diffusers.StableDiffusionPipeline.save_lora_weights(path.parent, weights, weight_name=path.name)
    return path


def infusion_and_lora(sd: engine.Engine, lora: Path) -> list[tuple[str, Image.Image]]:
    """The shipped cat, with and without a style; the concept was trained without it."""
    cat = engine.Infusion([engine.Concept.load(ASSETS / "concepts" / "striped-cat.safetensors")])
    styled = sd.with_loras([engine.LoRA(lora, _LORA_WEIGHT)])
    prompt = "a photo of a cat on a beach"
    found = []
    for name, one, custom in (
        ("the model", sd, None),
        ("LoRA", styled, None),
        ("Infusion", sd, cat),
        ("Infusion + LoRA", styled, cat),
    ):
        out = one.generate(prompt, seed=4, customization=custom, progress=False)
        found.append((name, out.images[0]))
    return found


def dci_and_long_prompt(sd: engine.Engine, concept: engine.Concept, steps: int = 50) -> list[tuple[str, Image.Image]]:
    """A prompt of two chunks of 75 tokens, drawn by the model, with ICO alone, and with DCI."""
    found = [("two chunks of text", sd.generate(LONG.format("cat"), seed=1, steps=steps, progress=False).images[0])]
    for name, custom in (
        ("ICO", engine.ICO([concept])),
        ("DCI", engine.DCI(concept, fraction=0.4)),
    ):
        found.append(
            (
                name,
                sd.generate(LONG.format("V* cat"), seed=1, customization=custom, steps=steps, progress=False).images[0],
            )
        )
    return found


def control_ico_and_inpainting(
    sd: engine.Engine, net: Path, concept: engine.Concept, steps: int = 50
) -> list[tuple[str, Image.Image]]:
    """A drawn dog is redrawn as the concept's cat, in the outlines of another drawing's cat."""
    given, wanted = (
        Scene((Thing(noun, colour, "large", "left", "middle", seed=4),), "meadow", seed=7)
        for noun, colour in (("dog", "brown"), ("cat", "orange"))
    )
    picture, outline = draw(given), outlines(to_tensor([draw(wanted)]))
    covered = sum(silhouettes(scene, _SIDE).max(axis=0).astype(int) for scene in (given, wanted)) > 0
    mask = F.max_pool2d(torch.from_numpy(covered)[None, None].float(), 9, 1, 4)[0, 0]
    white = Image.fromarray((mask * 255).byte().numpy())
    (hint,) = to_images(outline * 2 - 1)
    outlined = engine.load_controlnet(net, sd)
    found = [("picture", picture), ("mask", white.convert("RGB")), ("outlines", hint)]
    for name, weight in (("without the net", 0.0), ("together", 1.0)):
        out = sd.generate(
            "a photo of a V* cat in a meadow",
            image=picture,
            mask=white,
            strength=1.0,
            seed=5,
            steps=steps,
            guidance_scale=4.0,
            control=engine.Control(outlined, hint, weight),
            customization=engine.ICO([concept]),
            progress=False,
        )
        found.append((name, out.images[0]))
    return found


def page(rows: list[list[tuple[str, Image.Image]]]) -> Image.Image:
    """Named pictures, a line of them per combination."""
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (_SIDE + _GAP), len(rows) * (_SIDE + _LINE + _GAP)), "white")
    write, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_PX)
    for r, row in enumerate(rows):
        for c, (name, picture) in enumerate(row):
            x, y = c * (_SIDE + _GAP), r * (_SIDE + _LINE + _GAP)
            write.text((x, y), name, "black", font)
            sheet.paste(picture, (x, y + _LINE))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--net", type=Path, required=True, help="folder of a ControlNet for outlines")
    parser.add_argument("--out", type=Path, default=Path("runs/combined"), help="(default: runs/combined)")
    parser.add_argument("--steps", type=int, default=400, help="of the LoRA's training (default: 400)")
    arguments = parser.parse_args()
    sd = engine.load(device="cpu", dtype="float32")
    lora, learned = arguments.out / "inked.safetensors", arguments.out / "striped-cat-ico.safetensors"
    if not lora.exists():
        train_lora(lora, arguments.steps)
    if not learned.exists():
        engine.train_ico(sd, reference_pictures("striped-cat"), noun="cat", progress=False, **TUNED_ICO).save(learned)
    concept = engine.Concept.load(learned)
    page(
        [
            infusion_and_lora(sd, lora),
            dci_and_long_prompt(sd, concept),
            control_ico_and_inpainting(sd, arguments.net, concept),
        ]
    ).save(PAGE, optimize=True)


if __name__ == "__main__":
    main()
