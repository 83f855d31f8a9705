"""Training of Infusion concepts (arXiv:2404.14007, eq. 8): one residual vector per cross-attention layer, no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..checks import check_choice, check_texts
from ..engine import Engine
from ..methods.concept import Concept
from ..methods.infusion import Infusion, project_residual, residual_widths
from ..models.conditioning import Batch, Conditioning, Following
from ..observe.sheet import grid
from ..options import make_options, option, takes
from ..sampling.seeds import make_generator
from ..text.words import find_noun
from .denoising import (
    SAMPLE_SEEDS,
    SAMPLE_STEPS,
    Noiser,
    autocast,
    check_trainable,
    differentiable,
    training_size,
    weighted_mean,
)
from .loop import run
from .options import TrainOptions
from .pictures import Pictures

TEMPLATES = (
    "a photo of a {}",
    "a photo of the {}",
    "a picture of a {}",
    "a good photo of a {}",
    "a close-up photo of a {}",
    "a rendering of a {}",
    "a {}",
)


def _check_templates(name: str, value: Any) -> tuple[str, ...]:
    templates = check_texts(name, value)
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"{name} must be texts with one place {{}} for the noun, got {template!r}")
    return templates


@dataclass(frozen=True, slots=True, kw_only=True)
class InfusionOptions(TrainOptions):
    """What ``train_infusion`` takes; the paper's defaults (section 4.1)."""

    space: str = option(
        "text",
        '"text" (before the value projection, 16 x 768 numbers for SD v1.5) or "value" (after it).',
        partial(check_choice, choices=("text", "value")),
        flags=(),
    )
    tokens: str = option(
        "last",
        'whether a noun of several tokens is customised at its "last" one or at "all".',
        partial(check_choice, choices=("last", "all")),
        flags=(),
    )
    templates: Sequence[str] = option(TEMPLATES, "prompts with a place {} for the noun.", _check_templates)


@takes(InfusionOptions)
def train_infusion(sd: Engine, images: str | Path | Sequence[Any], noun: str, **options: Any) -> Concept:
    """Learn a concept from a few pictures.

    Minimises ``E ||eps - eps_C(z_t, t, text)||^2`` over the residuals alone, which start at zero. The foundation runs
    without gradient on the same noisy latents and text, and the customised pass takes its attention maps.

    Args:
        sd: the model; its weights stay as they are.
        images: a folder (jpg, png, webp) or a list of files, PIL pictures or arrays; middle squares are used.
        noun: the class noun, as prompts will spell it.
        {options}

    Returns:
        The concept.

    Raises:
        ValueError: an argument cannot be honoured; the message gives the rule and the value.
        NonFiniteError: the loss or its gradients became NaN or infinite.
    """
    asked = make_options(InfusionOptions, "train_infusion", options)
    objective = InfusionObjective(sd, images, noun, asked)
    return objective.concept(run(objective, asked))


class InfusionObjective:
    """Residuals, and their loss on reference pictures."""

    def __init__(self, sd: Engine, images: Any, noun: str, options: InfusionOptions) -> None:
        check_trainable(sd)
        size = training_size(sd, options.size)
        self.sd, self.noun, self.options = sd, noun, options
        self.layers = sd.unet.cross_attentions
        widths = residual_widths(sd.unet, options.space)
        self.parameters = {name: nn.Parameter(torch.zeros(n, device=sd.device)) for name, n in widths.items()}
        self.pictures = Pictures(sd, images, options.masks, size)
        prompts = [template.format(noun) for template in options.templates]
        self.sample_prompts = options.sample_prompts or (TEMPLATES[0].format(noun),)
        positions = [self._positions(prompt) for prompt in prompts]
        for prompt in self.sample_prompts:
            self._positions(prompt)
        self.text = sd.unet.text_kv(sd.encode_prompt(prompts))
        self.positions = torch.tensor(positions, device=sd.device)
        self.noiser = Noiser(sd)
        self.unet = differentiable(sd.unet, options.gradient_checkpointing)
        self.settings = {
            "method": "infusion",
            "model": sd.name,
            "dtype": str(sd.dtype).removeprefix("torch."),
            "noun": noun,
            **options.recorded("space", "tokens"),
            "templates": list(options.templates),
            "pictures": self.pictures.n_pictures,
            "pictures_hash": self.pictures.digest,
            "masks": options.masks is not None,
            "size": size,
        }

    def _positions(self, prompt: str) -> list[int]:
        positions = find_noun(self.sd.text_encoder.tokenize(prompt), self.noun)
        return positions if self.options.tokens == "all" else positions[-1:]

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters.values(), lr=self.options.learning_rate, weight_decay=0.0)

    def loss(self, part: int) -> Tensor:
        """Squared error of the customised noise prediction on micro-batch ``part``; mean, or mean over masks."""
        seed, size = self.options.seed, self.options.batch_size
        batch = self.pictures.batch(seed, part * size, size)
        generator = make_generator(seed, 2, part)
        prompts = torch.randint(0, len(self.positions), (size,), generator=generator).to(self.sd.device)
        noised = self.noiser(batch.latents, generator)
        predicted = self._predict(noised.latents, noised.timesteps, prompts)
        return weighted_mean((predicted - noised.noise).square(), batch.weights)

    def _predict(self, noisy: Tensor, timesteps: Tensor, prompts: Tensor) -> Tensor:
        """The customised pass's noise prediction, float32, under the foundation's maps on the same latents."""
        nobody = torch.empty(0, dtype=torch.int64, device=noisy.device)
        maps: list[tuple[Tensor, Tensor]] = []
        with autocast(self.sd):
            noisy = noisy.to(self.sd.dtype)
            with torch.no_grad():
                shifts = self.unet.time_shifts(timesteps)
                text = tuple((keys[prompts], values[prompts]) for keys, values in self.text)
                watched = Following(self.positions[prompts], nobody, ())
                keep = lambda layer, out, columns: maps.append((out, columns))  # noqa: E731
                self.unet.denoise(noisy, Conditioning(Batch(text, watched), shifts, observe=keep))
            residuals = tuple(
                residual.expand(len(noisy), -1, -1).to(out.dtype)
                for residual, (out, _) in zip(self.projected(), maps, strict=True)
            )
            everyone = torch.arange(len(noisy), device=noisy.device)
            following = Following(watched.tokens, everyone, residuals, tuple(maps))
            return self.unet.denoise(noisy, Conditioning(Batch((), following), shifts)).float()

    def projected(self) -> list[Tensor]:
        """Per cross-attention layer (T*H, C), what the customised tokens add to its output."""
        n_tokens = self.positions.shape[1]
        return [
            project_residual(attn2, self.parameters[name], self.options.space).repeat(n_tokens, 1)
            for name, attn2 in self.layers.items()
        ]

    def concept(self, steps: int) -> Concept:
        """The concept as it is now, after ``steps`` steps."""
        residuals = {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}
        training = {name: self.settings[name] for name in ("model", "learning_rate", "batch_size", "pictures", "seed")}
        return Concept(self.noun, residuals, self.options.space, self.sd.fingerprint, {"steps": steps, **training})

    def sample(self) -> Image.Image:
        """For every sample prompt and fixed seed, the foundation's picture above the customised one."""
        concept, n_seeds = self.concept(0), len(SAMPLE_SEEDS)
        out = self.sd.generate(
            self.sample_prompts,
            images_per_prompt=n_seeds,
            seed=list(SAMPLE_SEEDS) * len(self.sample_prompts),
            steps=SAMPLE_STEPS,
            customization=Infusion([concept], tokens=self.options.tokens),
            progress=False,
        )
        bases, rows = out.foundation_images or [], range(0, len(out.images), n_seeds)
        pictures = [picture for at in rows for kind in (bases, out.images) for picture in kind[at : at + n_seeds]]
        return grid(pictures, columns=n_seeds)
