"""Training of ICO concepts (ECCV 2024, eq. 2): tokens, contexts of single images, and the text's keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..checks import check_choice, check_flag, check_integer, check_number
from ..engine import Engine
from ..methods.concept import Change, Concept
from ..methods.ico import ICO, TextKV
from ..models.conditioning import Conditioning
from ..observe.sheet import grid
from ..text.encoder import TextEncoder, Tokens
from .denoising import SAMPLE_SEEDS, SAMPLE_STEPS, Noiser, autocast, differentiable, training_size, weighted_mean
from .loop import Callback, Options, run
from .pictures import Pictures, make_generator

SCHEMES: dict[str, tuple[int, int, int]] = {  # tokens before the concept, after it, and of it
    "ico": (4, 2, 2),
    "dci": (1, 1, 3),
}
_PREFIX, _SUFFIX = "a photo of a", "."
_BEFORE, _AFTER = "<before>", "<after>"  # stand in for an image's contexts
_RARE_SHARE = 20  # tokens are chosen from the last twentieth of the vocabulary, whose merges are its rarest
_PRIOR_BATCH = 4


def train_ico(
    sd: Engine,
    images: str | Path | Sequence[Any],
    noun: str,
    *,
    steps: int = 900,
    scheme: str = "dci",
    train_kv: bool = True,
    learning_rate: float = 6e-5,
    context_learning_rate: float = 6e-4,
    batch_size: int = 6,
    accumulation_steps: int = 1,
    initial_tokens: str | None = None,
    placeholder: str = "V*",
    masks: str | Path | Sequence[Any] | None = None,
    prior_images: int = 0,
    prior_weight: float = 1.0,
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
    """Learn a concept from a few pictures, with a context of its own for each picture.

    The prompt of picture j is ``[I]^j_1..M [T]_1..S noun [I]^j_M+1..M+L``. Minimises ``E ||eps - eps_theta||^2`` over
    the contexts I, the concept's tokens T and changes of W_K and W_V in every cross-attention layer, which start at
    zero. The contexts take what is particular to a picture, and are thrown away.

    Args:
        sd: the model; its weights stay as they are.
        images: a folder (jpg, png, webp) or a list of files, PIL pictures or arrays; middle squares are used.
        noun: the class noun, as prompts will spell it behind the placeholder.
        steps: optimiser steps.
        scheme: how many tokens M, L and S there are: "ico" (4, 2, 2), or "dci" (1, 1, 3), to draw with ``DCI``.
        train_kv: whether keys and values change too; if not, the tokens alone do.
        learning_rate: of AdamW for tokens, keys and values; without weight decay.
        context_learning_rate: for the contexts.
        batch_size: pictures per micro-batch.
        accumulation_steps: micro-batches per step.
        initial_tokens: words that T starts from, S tokens in all; distinct rare tokens where not given.
        placeholder: what prompts will write for T.
        masks: a greyscale picture per reference picture, in a folder by the same stem or in a list; the loss is the
            mean over what they mark.
        prior_images: class pictures that the model draws of the noun beforehand; as many as the batch has pictures are
            trained on beside it, against forgetting the class. 0 for none.
        prior_weight: of their loss.
        size: training resolution in pixels; the model's own where not given.
        seed: of everything random.
        gradient_checkpointing: recompute activations in the backward pass; slower, in a fraction of the memory.
        folder: where checkpoint, log (also TensorBoard's, if it is installed) and sample sheets go; a run that was
            stopped goes on from there.
        checkpoint_every, sample_every: in steps; no samples for 0.
        sample_prompts: prompts of the sample sheets (the model's own picture above the concept's), with placeholder.
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
    objective = ICOObjective(
        sd,
        images,
        noun,
        scheme=check_choice("scheme", scheme, tuple(SCHEMES)),
        train_kv=check_flag("train_kv", train_kv),
        learning_rate=check_number("learning_rate", learning_rate, 0.0),
        context_learning_rate=check_number("context_learning_rate", context_learning_rate, 0.0),
        batch_size=check_integer("batch_size", batch_size, 1),
        accumulation_steps=accumulation_steps,
        initial_tokens=initial_tokens,
        placeholder=placeholder,
        masks=masks,
        prior_images=check_integer("prior_images", prior_images, 0),
        prior_weight=check_number("prior_weight", prior_weight, 0.0),
        size=size,
        seed=check_integer("seed", seed, 0),
        gradient_checkpointing=check_flag("gradient_checkpointing", gradient_checkpointing),
        sample_prompts=sample_prompts,
    )
    return objective.concept(run(objective, options))


class ICOObjective:
    """Contexts, tokens and changes of keys and values, and their loss on reference pictures."""

    def __init__(
        self,
        sd: Engine,
        images: Any,
        noun: str,
        *,
        scheme: str,
        train_kv: bool,
        learning_rate: float,
        context_learning_rate: float,
        batch_size: int,
        accumulation_steps: int,
        initial_tokens: str | None,
        placeholder: str,
        masks: Any,
        prior_images: int,
        prior_weight: float,
        size: int | None,
        seed: int,
        gradient_checkpointing: bool,
        sample_prompts: Sequence[str] | None,
    ) -> None:
        size = training_size(sd, size)
        self.sd, self.noun, self.placeholder, self.seed = sd, noun, placeholder, seed
        self.learning_rate, self.context_learning_rate = learning_rate, context_learning_rate
        self.batch_size, self.prior_weight = batch_size, prior_weight
        self.pictures = Pictures(sd, images, masks, size)
        n_before, n_after, n_tokens = SCHEMES[scheme]
        text, n_pictures = sd.text_encoder, self.pictures.n_pictures
        tokens = _initial_tokens(text, n_tokens, initial_tokens, seed)
        before, after = _repeated(text, _PREFIX, n_before), _repeated(text, _SUFFIX, n_after)
        self.parameters = {
            "tokens": nn.Parameter(tokens),
            "before": nn.Parameter(before.repeat(n_pictures, 1, 1)),
            "after": nn.Parameter(after.repeat(n_pictures, 1, 1)),
        }
        if train_kv:
            for name, projection in sd.unet.text_projections.items():
                self.parameters[name] = nn.Parameter(torch.zeros_like(projection.weight, dtype=torch.float32))
        marks = {_BEFORE: before, placeholder: tokens, _AFTER: after}
        concepts = [Concept("", tokens=vectors, placeholder=mark) for mark, vectors in marks.items()]
        self.prompt = text.tokenize(f"{_BEFORE} {placeholder} {noun} {_AFTER}", concepts)
        self.sample_prompts = [f"a photo of a {placeholder} {noun}"] if sample_prompts is None else list(sample_prompts)
        for prompt in self.sample_prompts:
            if placeholder not in prompt:
                raise ValueError(f"sample_prompts must contain {placeholder!r}, got {prompt!r}")
        self.class_prompt = text.tokenize(f"{_PREFIX} {noun}")
        self.prior = _class_latents(sd, f"{_PREFIX} {noun}", prior_images, size, seed)
        self.noiser = Noiser(sd)
        self.unet = differentiable(sd.unet, gradient_checkpointing)
        self.settings = {
            "method": "ico",
            "model": sd.name,
            "dtype": str(sd.dtype).removeprefix("torch."),
            "noun": noun,
            "scheme": scheme,
            "train_kv": train_kv,
            "learning_rate": learning_rate,
            "context_learning_rate": context_learning_rate,
            "batch_size": batch_size,
            "accumulation_steps": accumulation_steps,
            "initial_tokens": initial_tokens,
            "placeholder": placeholder,
            "pictures": n_pictures,
            "masks": masks is not None,
            "prior_images": prior_images,
            "prior_weight": prior_weight,
            "size": size,
            "seed": seed,
        }

    def optimizer(self) -> torch.optim.Optimizer:
        contexts = [self.parameters["before"], self.parameters["after"]]
        others = [parameter for name, parameter in self.parameters.items() if name not in ("before", "after")]
        groups = [{"params": others}, {"params": contexts, "lr": self.context_learning_rate}]
        return torch.optim.AdamW(groups, lr=self.learning_rate, weight_decay=0.0)

    def loss(self, part: int) -> Tensor:
        """Squared error of the noise prediction on micro-batch ``part``, and on as many class pictures."""
        batch = self.pictures.batch(self.seed, part * self.batch_size, self.batch_size)
        generator = make_generator(self.seed, 2, part)
        prompts, latents = [self._prompt(picture) for picture in batch.pictures], batch.latents
        if self.prior is not None:
            chosen = torch.randint(0, len(self.prior), (self.batch_size,), generator=generator)
            prompts += [self.class_prompt] * self.batch_size
            latents = torch.cat([latents, self.prior[chosen.to(latents.device)]])
        noised = self.noiser(latents, generator)
        with autocast(self.sd):
            text = self._text_kv(self.sd.text_encoder.transform(prompts))
            condition = Conditioning(self.unet.time_shifts(noised.timesteps), text)
            predicted = self.unet.denoise(noised.latents.to(self.sd.dtype), condition)
        error = (predicted.float() - noised.noise).square()
        loss = weighted_mean(error[: self.batch_size], batch.weights)
        return loss if self.prior is None else loss + self.prior_weight * error[self.batch_size :].mean()

    def _prompt(self, picture: int) -> Tokens:
        """The training prompt of a picture; gradients reach its vectors."""
        before, after = self.parameters["before"][picture], self.parameters["after"][picture]
        vectors = torch.cat([before, self.parameters["tokens"], after])
        places = (at for at, _ in self.prompt.learned)
        return replace(self.prompt, learned=tuple(zip(places, vectors, strict=True)))

    def _text_kv(self, context: Tensor) -> TextKV:
        rows = []
        for name, projection in self.unet.text_projections.items():
            change = self.parameters.get(name)
            own = projection(context)
            rows.append(own if change is None else own + F.linear(context, change.to(context.dtype)))
        return tuple(zip(rows[::2], rows[1::2], strict=True))

    def concept(self, steps: int) -> Concept:
        """The concept as it is now, after ``steps`` steps."""
        values = {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}
        changes = {name: Change(values[name]) for name in self.sd.unet.text_projections if name in values}
        kept = ("model", "scheme", "learning_rate", "context_learning_rate", "batch_size", "pictures", "seed")
        training = {name: self.settings[name] for name in kept}
        return Concept(
            self.noun,
            base=self.sd.fingerprint,
            training={"steps": steps, **training},
            tokens=values["tokens"],
            placeholder=self.placeholder,
            changes=changes,
        )

    def sample(self) -> Image.Image:
        """For every sample prompt and fixed seed, the model's own picture of the noun above the concept's."""
        custom, n_seeds = ICO([self.concept(0)]), len(SAMPLE_SEEDS)
        plain = [" ".join(prompt.replace(self.placeholder, "").split()) for prompt in self.sample_prompts]
        pairs = list(zip(plain, self.sample_prompts, strict=True))
        out = self.sd.generate(
            [prompt for pair in pairs for prompt in pair],
            images_per_prompt=n_seeds,
            seed=list(SAMPLE_SEEDS) * 2 * len(pairs),
            steps=SAMPLE_STEPS,
            customization=[*[None] * n_seeds, *[custom] * n_seeds] * len(pairs),
            progress=False,
        )
        return grid(out.images, columns=n_seeds)


def _embeddings(text: TextEncoder, ids: Sequence[int]) -> Tensor:
    weight: Tensor = text.model.get_input_embeddings().weight
    return weight[torch.tensor(ids, device=weight.device)].detach().float()


def _repeated(text: TextEncoder, words: str, count: int) -> Tensor:
    """Embeddings (count, E) of the last ``count`` tokens of some words, the first of them repeated in front."""
    tokens = text.tokenize(words)
    ids = list(tokens.ids[1 : 1 + len(tokens.spans)])
    return _embeddings(text, ([ids[0]] * count + ids)[-count:])


def _initial_tokens(text: TextEncoder, count: int, words: str | None, seed: int) -> Tensor:
    """(count, E), from words or from distinct rare tokens that end a word."""
    if words is not None:
        tokens = text.tokenize(words) if isinstance(words, str) else None
        if tokens is None or len(tokens.spans) != count:
            found = words if tokens is None else f"{words!r}, {len(tokens.spans)} tokens"
            raise ValueError(f"initial_tokens must be words of {count} tokens in all, got {found}")
        return _embeddings(text, tokens.ids[1 : 1 + count])
    special = set(text.tokenizer.all_special_ids)
    ids = sorted(i for token, i in text.tokenizer.get_vocab().items() if token.endswith("</w>") and i not in special)
    rare = ids[-max(count, len(ids) // _RARE_SHARE) :]
    order = torch.randperm(len(rare), generator=make_generator(seed, 3))
    return _embeddings(text, [rare[int(i)] for i in order[:count]])


def _class_latents(sd: Engine, prompt: str, count: int, size: int, seed: int) -> Tensor | None:
    """(count, 4, h, w) float32: what the model itself draws of the class."""
    if not count:
        return None
    parts = []
    for first in range(0, count, _PRIOR_BATCH):
        n = min(_PRIOR_BATCH, count - first)
        options = {"height": size, "width": size, "output": "latent", "progress": False}
        parts.append(sd.generate(prompt, images_per_prompt=n, seed=seed + first, **options).images)
    return torch.cat(parts)
