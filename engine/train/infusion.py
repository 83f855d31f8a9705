"""Training of Infusion concepts (arXiv:2404.14007, eq. 8): one residual vector per cross-attention layer, no more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..checks import check_choice, check_flag, check_integer, check_number
from ..engine import Engine
from ..methods.concept import Concept
from ..methods.infusion import Infusion, project_residual, residual_widths
from ..models.conditioning import Conditioning, Following
from ..observe.sheet import grid
from ..text.encoder import find_noun
from .denoising import SAMPLE_SEEDS, SAMPLE_STEPS, Noiser, autocast, differentiable, training_size, weighted_mean
from .loop import Callback, Options, run
from .pictures import Pictures, make_generator

TEMPLATES = (
    "a photo of a {}",
    "a photo of the {}",
    "a picture of a {}",
    "a good photo of a {}",
    "a close-up photo of a {}",
    "a rendering of a {}",
    "a {}",
)


def train_infusion(
    sd: Engine,
    images: str | Path | Sequence[Any],
    noun: str,
    *,
    steps: int = 500,
    learning_rate: float = 0.01,
    batch_size: int = 4,
    accumulation_steps: int = 1,
    space: str = "text",
    tokens: str = "last",
    masks: str | Path | Sequence[Any] | None = None,
    templates: Sequence[str] = TEMPLATES,
    size: int | None = None,
    seed: int = 0,
    gradient_checkpointing: bool = False,
    folder: str | Path | None = None,
    checkpoint_every: int = 100,
    sample_every: int = 100,
    sample_prompts: Sequence[str] | None = None,
    callback: Callback | None = None,
    progress: bool = True,
) -> Concept:
    """Learn a concept from a few pictures.

    Minimises ``E ||eps - eps_C(z_t, t, text)||^2`` over the residuals alone, which start at zero. The foundation runs
    without gradient on the same noisy latents and text, and the customised pass takes its attention maps.

    Args:
        sd: the model; its weights stay as they are.
        images: a folder (jpg, png, webp) or a list of files, PIL pictures or arrays; middle squares are used.
        noun: the class noun, as prompts will spell it.
        steps: optimiser steps.
        learning_rate: of AdamW, without weight decay.
        batch_size: pictures per micro-batch.
        accumulation_steps: micro-batches per step.
        space: "text" (before the value projection, 16 x 768 numbers for SD v1.5) or "value" (after it).
        tokens: whether a noun of several tokens is customised at its "last" one or at "all".
        masks: a greyscale picture per reference picture, in a folder by the same stem or in a list; the loss is the
            mean over what they mark.
        templates: prompts with a place ``{}`` for the noun.
        size: training resolution in pixels; the model's own where not given.
        seed: of everything random.
        gradient_checkpointing: recompute activations in the backward pass; slower, in a fraction of the memory.
        folder: where checkpoint, log (also TensorBoard's, if it is installed) and sample sheets go; a run that was
            stopped goes on from there.
        checkpoint_every, sample_every: in steps; no samples for 0.
        sample_prompts: prompts of the sample sheets (foundation above customised), which must contain the noun.
        callback: ``callback(step, total, loss)`` after every step, counted from 0; returning False ends the training.
        progress: show a progress bar.

    Returns:
        The concept.

    Raises:
        ValueError: an argument cannot be honoured; the message gives the rule and the value.
        NonFiniteError: the loss became NaN or infinite.
    """
    options = Options(
        steps=steps,
        accumulation_steps=accumulation_steps,
        folder=None if folder is None else Path(folder),
        checkpoint_every=checkpoint_every,
        sample_every=sample_every,
        callback=callback,
        progress=progress,
    )
    if folder is None and sample_prompts is not None:
        raise ValueError("sample_prompts needs a folder for the sheets; give folder too")
    objective = InfusionObjective(
        sd,
        images,
        noun,
        learning_rate=check_number("learning_rate", learning_rate, 0.0),
        batch_size=check_integer("batch_size", batch_size, 1),
        accumulation_steps=accumulation_steps,
        space=check_choice("space", space, ("text", "value")),
        tokens=check_choice("tokens", tokens, ("last", "all")),
        masks=masks,
        templates=templates,
        size=size,
        seed=check_integer("seed", seed, 0),
        gradient_checkpointing=check_flag("gradient_checkpointing", gradient_checkpointing),
        sample_prompts=sample_prompts,
    )
    return objective.concept(run(objective, options))


class InfusionObjective:
    """Residuals, and their loss on reference pictures."""

    def __init__(
        self,
        sd: Engine,
        images: Any,
        noun: str,
        *,
        learning_rate: float,
        batch_size: int,
        accumulation_steps: int,
        space: str,
        tokens: str,
        masks: Any,
        templates: Sequence[str],
        size: int | None,
        seed: int,
        gradient_checkpointing: bool,
        sample_prompts: Sequence[str] | None,
    ) -> None:
        size = training_size(sd, size)
        self.sd, self.noun, self.space, self.tokens = sd, noun, space, tokens
        self.learning_rate, self.batch_size, self.seed = learning_rate, batch_size, seed
        self.layers = sd.unet.cross_attentions
        widths = residual_widths(sd.unet, space)
        self.parameters = {name: nn.Parameter(torch.zeros(n, device=sd.device)) for name, n in widths.items()}
        self.pictures = Pictures(sd, images, masks, size)
        prompts = [_fill(template, noun) for template in templates]
        self.sample_prompts = [_fill(TEMPLATES[0], noun)] if sample_prompts is None else list(sample_prompts)
        positions = [self._positions(prompt) for prompt in prompts]
        for prompt in self.sample_prompts:
            self._positions(prompt)
        self.text = sd.unet.text_kv(sd.encode_prompt(prompts))
        self.positions = torch.tensor(positions, device=sd.device)
        self.noiser = Noiser(sd)
        self.unet = differentiable(sd.unet, gradient_checkpointing)
        self.settings = {
            "method": "infusion",
            "model": sd.name,
            "dtype": str(sd.dtype).removeprefix("torch."),
            "noun": noun,
            "space": space,
            "tokens": tokens,
            "learning_rate": learning_rate,
            "batch_size": batch_size,
            "accumulation_steps": accumulation_steps,
            "pictures": self.pictures.n_pictures,
            "masks": masks is not None,
            "templates": list(templates),
            "size": size,
            "seed": seed,
        }

    def _positions(self, prompt: str) -> list[int]:
        positions = find_noun(self.sd.text_encoder.tokenize(prompt), self.noun)
        return positions if self.tokens == "all" else positions[-1:]

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters.values(), lr=self.learning_rate, weight_decay=0.0)

    def loss(self, part: int) -> Tensor:
        """Squared error of the customised noise prediction on micro-batch ``part``; mean, or mean over masks."""
        batch = self.pictures.batch(self.seed, part * self.batch_size, self.batch_size)
        generator = make_generator(self.seed, 2, part)
        n_prompts, device = len(self.positions), self.sd.device
        prompts = torch.randint(0, n_prompts, (self.batch_size,), generator=generator).to(device)
        noised = self.noiser(batch.latents, generator)
        predicted = self._predict(noised.latents, noised.timesteps, prompts)
        return weighted_mean((predicted - noised.noise).square(), batch.weights)

    def _predict(self, noisy: Tensor, timesteps: Tensor, prompts: Tensor) -> Tensor:
        """The customised pass's noise prediction, float32, under the foundation's maps on the same latents."""
        n_rows, n_tokens = len(noisy), self.positions.shape[1]
        nobody = torch.empty(0, dtype=torch.int64, device=noisy.device)
        maps: list[tuple[Tensor, Tensor]] = []
        with autocast(self.sd):
            noisy = noisy.to(self.sd.dtype)
            with torch.no_grad():
                shifts = self.unet.time_shifts(timesteps)
                text = tuple((keys[prompts], values[prompts]) for keys, values in self.text)
                watched = Following(self.positions[prompts], nobody, ())
                keep = lambda layer, out, columns: maps.append((out, columns))  # noqa: E731
                self.unet.denoise(noisy, Conditioning(shifts, text, watched, observe=keep))
            residuals = tuple(
                project_residual(attn2, self.parameters[name], self.space).repeat(n_tokens, 1).expand(n_rows, -1, -1)
                for name, attn2 in self.layers.items()
            )
            residuals = tuple(residual.to(out.dtype) for residual, (out, _) in zip(residuals, maps, strict=True))
            everyone = torch.arange(n_rows, device=noisy.device)
            following = Following(watched.tokens, everyone, residuals, tuple(maps))
            return self.unet.denoise(noisy, Conditioning(shifts, (), following)).float()

    def concept(self, steps: int) -> Concept:
        """The concept as it is now, after ``steps`` steps."""
        residuals = {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}
        training = {name: self.settings[name] for name in ("model", "learning_rate", "batch_size", "pictures", "seed")}
        return Concept(self.noun, residuals, self.space, self.sd.fingerprint, {"steps": steps, **training})

    def sample(self) -> Image.Image:
        """For every sample prompt and fixed seed, the foundation's picture above the customised one."""
        concept, n_seeds = self.concept(0), len(SAMPLE_SEEDS)
        out = self.sd.generate(
            self.sample_prompts,
            images_per_prompt=n_seeds,
            seed=list(SAMPLE_SEEDS) * len(self.sample_prompts),
            steps=SAMPLE_STEPS,
            customization=Infusion([concept], tokens=self.tokens),
            progress=False,
        )
        bases, rows = out.foundation_images or [], range(0, len(out.images), n_seeds)
        pictures = [picture for at in rows for kind in (bases, out.images) for picture in kind[at : at + n_seeds]]
        return grid(pictures, columns=n_seeds)


def _fill(template: str, noun: str) -> str:
    if not isinstance(template, str) or template.count("{}") != 1:
        raise ValueError(f"templates must be texts with one place {{}} for the noun, got {template!r}")
    return template.format(noun)
