"""Other ways to train an Infusion concept, each of which might keep more of the foundation's layout."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import engine
from benchmarks.tinyworld.concepts import CONCEPTS, reference_pictures, reference_scenes
from benchmarks.tinyworld.interventions import SLOTS, Part, Residuals, slot_positions
from benchmarks.tinyworld.scene import silhouettes
from engine.methods.infusion import project_residual
from engine.train import loop
from engine.train.denoising import Noiser
from engine.train.infusion import TEMPLATES, InfusionObjective, InfusionOptions

BATCH_SIZE, STEPS, RATE = 4, 250, 0.03  # the study's batch and rate, and its second checkpoint
_ZOOMS, _LEAST = 12, 0.5  # zoomed pictures of each reference, and the least zoom


@dataclass(frozen=True, slots=True)
class Training:
    """What differs from the method's own training.

    Attributes:
        zoomed: None or, for references shrunk to 50 to 100 % and moved, numpy's word for how the frame is filled:
            "symmetric" mirrors them, "edge" stretches their edges.
        masked: "" for no masks, "object" for the object's silhouette, "picture" for what is not filled.
        sides: residuals at layers of these sides alone.
        slots: residuals at these tokens; see ``interventions.SLOTS``.
        windows: residuals of their own for each (first, last) share of the steps.
    """

    zoomed: Literal["symmetric", "edge"] | None = None
    masked: str = ""
    sides: tuple[int, ...] = (16, 8, 4, 2)
    slots: tuple[str, ...] = ("noun",)
    windows: tuple[tuple[float, float], ...] = ((0.0, 1.0),)


TRAININGS = {
    "the method": Training(),
    "references zoomed": Training(zoomed="symmetric"),
    "references zoomed, loss off their edges": Training(zoomed="symmetric", masked="picture"),
    "references zoomed on stretched edges, loss off these": Training(zoomed="edge", masked="picture"),
    "loss on the object": Training(masked="object"),
    "layers of 16 and 8": Training(sides=(16, 8)),
    "noun and the token before": Training(slots=("noun", "before")),
    "noun and end token": Training(slots=("noun", "end")),
    "residuals apart before and after 40 %": Training(windows=((0.0, 0.4), (0.4, 1.0))),
    "after 40 % of the steps": Training(windows=((0.4, 1.0),)),
}


def train(sd: engine.Engine, concept: str, training: Training, path: Path) -> list[Part]:
    """The learned residuals, one part per window; from ``path`` where that has been done."""
    if path.exists():
        return [Part(*one) for one in torch.load(path, weights_only=True)]
    images, masks = _pictures(concept, training)
    parts = []
    for first, last in training.windows:
        options = InfusionOptions(
            steps=STEPS, learning_rate=RATE, batch_size=BATCH_SIZE, masks=masks, progress=False, templates=TEMPLATES
        )
        objective = _Objective(sd, images, CONCEPTS[concept].noun, options, training, (first, last))
        loop.run(objective, options)
        parts.append((objective.residuals(), first, last))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(parts, path)
    return [Part(*one) for one in parts]


def layer_sides(sd: engine.Engine) -> list[int]:
    """Side of each cross-attention layer's positions, in forward order."""
    coarsest = len(sd.unet.config.block_out_channels) - 1

    def level(name: str) -> int:
        block, number, *_ = name.split(".")
        return (
            {"down_blocks": int(number), "up_blocks": coarsest - int(number)}[block] if number.isdigit() else coarsest
        )

    return [sd.unet.config.sample_size >> level(name) for name in sd.unet.cross_attentions]


class _Objective(InfusionObjective):
    """Residuals at chosen layers, tokens and timesteps."""

    def __init__(
        self,
        sd: engine.Engine,
        images: Sequence[Image.Image],
        noun: str,
        options: InfusionOptions,
        training: Training,
        window: tuple[float, float],
    ) -> None:
        super().__init__(sd, images, noun, options)
        self.slots = training.slots
        self.acts = [side in training.sides for side in layer_sides(sd)]
        self.parameters = {
            f"{slot}:{name}": nn.Parameter(torch.zeros(attn2.to_v.in_features))
            for slot in self.slots
            for name, attn2 in self.layers.items()
        }
        texts = [sd.text_encoder.tokenize(template.format(noun)) for template in options.templates]
        places: list[dict[str, int]] = [dict(zip(SLOTS, slot_positions(text, noun), strict=True)) for text in texts]
        self.positions = torch.tensor([[one[slot] for slot in self.slots] for one in places])
        self.noiser = _WindowNoiser(sd, *window)

    def projected(self) -> list[Tensor]:
        own = [self._of(slot) for slot in self.slots]
        return [torch.cat(layer) for layer in zip(*own, strict=True)]

    def residuals(self) -> Residuals:
        """As ``interventions`` takes them."""
        return {slot: [one.detach() for one in self._of(slot)] for slot in self.slots}

    def _of(self, slot: str) -> list[Tensor]:
        return [
            acts * project_residual(attn2, self.parameters[f"{slot}:{name}"], self.options.space)
            for acts, (name, attn2) in zip(self.acts, self.layers.items(), strict=True)
        ]


class _WindowNoiser(Noiser):
    """Timesteps uniform over a part of the schedule, given as shares of the steps from the noisiest."""

    def __init__(self, sd: engine.Engine, first: float, last: float) -> None:
        super().__init__(sd)
        n = len(self.alphas_cumprod)
        self.low, self.high = round((1 - last) * n), round((1 - first) * n)

    def timesteps(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.low, self.high, (n,), generator=generator)


def _pictures(concept: str, training: Training) -> tuple[list[Image.Image], list[Image.Image] | None]:
    images, rng = reference_pictures(concept), random.Random(concept)
    masks = [Image.new("L", one.size, 255) for one in images]
    if training.masked == "object":
        masks = [Image.fromarray(silhouettes(scene, 128).max(axis=0)) for scene in reference_scenes(concept)]
    if training.zoomed:
        pairs = [_zoomed(image, training.zoomed, rng) for image in images for _ in range(_ZOOMS)]
        images, masks = [image for image, _ in pairs], [mask for _, mask in pairs]
    return images, masks if training.masked else None


def _zoomed(
    image: Image.Image, filled: Literal["symmetric", "edge"], rng: random.Random
) -> tuple[Image.Image, Image.Image]:
    """The picture shrunk and moved within its frame, and a mask of where it is."""
    side = image.width
    small = round(rng.uniform(_LEAST, 1.0) * side)
    left, top = rng.randint(0, side - small), rng.randint(0, side - small)
    around = ((top, side - small - top), (left, side - small - left))
    pixels = np.asarray(image.resize((small, small), Image.Resampling.LANCZOS))
    mask = np.pad(np.full((small, small), 255, np.uint8), around)
    return Image.fromarray(np.pad(pixels, (*around, (0, 0)), mode=filled)), Image.fromarray(mask)
