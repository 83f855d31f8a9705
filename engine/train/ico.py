"""Training of ICO concepts (ECCV 2024, eq. 2): tokens, contexts of single images, and the text's keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..checks import check_choice, check_flag, check_integer, check_number
from ..engine import Engine
from ..methods.concept import Change, Concept
from ..methods.ico import ICO
from ..models.conditioning import Batch, Conditioning, TextKV
from ..observe.sheet import grid
from ..options import make_options, option, takes
from ..sampling.seeds import make_generator
from ..text.encoder import TextEncoder, Tokens
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

SCHEMES: dict[str, tuple[int, int, int]] = {  # tokens before the concept, after it, and of it
    "ico": (4, 2, 2),
    "dci": (1, 1, 3),
}
_PREFIX, _SUFFIX = "a photo of a", "."
_BEFORE, _AFTER = "<before>", "<after>"  # stand in for an image's contexts
_RARE_SHARE = 20  # tokens are chosen from the last twentieth of the vocabulary, whose merges are its rarest
_PRIOR_BATCH = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ICOOptions(TrainOptions):
    """What ``train_ico`` takes; the paper's defaults (section 4.1)."""

    steps: int = option(900, "optimiser steps of the whole run.", partial(check_integer, low=1), flags=())
    learning_rate: float = option(
        6e-5, "of AdamW for tokens, keys and values; without weight decay.", partial(check_number, low=0.0), flags=()
    )
    context_learning_rate: float = option(6e-4, "for the contexts.", partial(check_number, low=0.0), flags=())
    batch_size: int = option(6, "pictures per micro-batch.", partial(check_integer, low=1), flags=())
    scheme: str = option(
        "dci",
        'how many tokens M, L and S there are: "ico" (4, 2, 2), or "dci" (1, 1, 3), to draw with DCI.',
        partial(check_choice, choices=tuple(SCHEMES)),
        flags=(),
    )
    train_kv: bool = option(
        True, "whether keys and values change too; if not, the tokens alone do.", check_flag, flags=()
    )
    initial_tokens: str | None = option(
        None,
        "words that T starts from, S tokens in all; distinct rare tokens where not given.",
        flags=(),
        metavar="WORDS",
    )
    placeholder: str = option("V*", "what prompts will write for T.", flags=())
    prior_images: int = option(
        0,
        "class pictures that the model draws of the noun beforehand; as many as the batch has pictures are trained on "
        "beside it, against forgetting the class.",
        partial(check_integer, low=0),
        flags=(),
    )
    prior_weight: float = option(1.0, "of their loss.", partial(check_number, low=0.0), flags=())


@takes(ICOOptions)
def train_ico(sd: Engine, images: str | Path | Sequence[Any], noun: str, **options: Any) -> Concept:
    """Learn a concept from a few pictures, with a context of its own for each picture.

    The prompt of picture j is ``[I]^j_1..M [T]_1..S noun [I]^j_M+1..M+L``. Minimises ``E ||eps - eps_theta||^2`` over
    the contexts I, the concept's tokens T and changes of W_K and W_V in every cross-attention layer, which start at
    zero. The contexts take what is particular to a picture, and are thrown away.

    Args:
        sd: the model; its weights stay as they are.
        images: a folder (jpg, png, webp) or a list of files, PIL pictures or arrays; middle squares are used.
        noun: the class noun, as prompts will spell it behind the placeholder.
        {options}

    Returns:
        The concept.

    Raises:
        ValueError: an argument cannot be honoured; the message gives the rule and the value.
        NonFiniteError: the loss or its gradients became NaN or infinite.
    """
    asked = make_options(ICOOptions, "train_ico", options)
    objective = ICOObjective(sd, images, noun, asked)
    return objective.concept(run(objective, asked))


class ICOObjective:
    """Contexts, tokens and changes of keys and values, and their loss on reference pictures."""

    def __init__(self, sd: Engine, images: Any, noun: str, options: ICOOptions) -> None:
        check_trainable(sd)
        size = training_size(sd, options.size)
        self.sd, self.noun, self.options = sd, noun, options
        self.pictures = Pictures(sd, images, options.masks, size)
        self._start_parameters()
        self.prompt = self._training_prompt()
        self.sample_prompts = options.sample_prompts or (f"a photo of a {options.placeholder} {noun}",)
        for prompt in self.sample_prompts:
            if options.placeholder not in prompt:
                raise ValueError(f"sample_prompts must contain {options.placeholder!r}, got {prompt!r}")
        self.class_prompt = sd.text_encoder.tokenize(f"{_PREFIX} {noun}")
        self.prior = _class_latents(sd, f"{_PREFIX} {noun}", options.prior_images, size, options.seed)
        self.noiser = Noiser(sd)
        self.unet = differentiable(sd.unet, options.gradient_checkpointing)
        own = ("context_learning_rate", "scheme", "train_kv", "initial_tokens", "placeholder", "prior_images")
        self.settings = {
            "method": "ico",
            "model": sd.name,
            "dtype": str(sd.dtype).removeprefix("torch."),
            "noun": noun,
            **options.recorded(*own, "prior_weight"),
            "pictures": self.pictures.n_pictures,
            "pictures_hash": self.pictures.digest,
            "masks": options.masks is not None,
            "size": size,
        }

    def _start_parameters(self) -> None:
        options, text, n_pictures = self.options, self.sd.text_encoder, self.pictures.n_pictures
        n_before, n_after, n_tokens = SCHEMES[options.scheme]
        self.parameters = {
            "tokens": nn.Parameter(initial_tokens(text, n_tokens, options.initial_tokens, options.seed)),
            "before": nn.Parameter(_repeated(text, _PREFIX, n_before).repeat(n_pictures, 1, 1)),
            "after": nn.Parameter(_repeated(text, _SUFFIX, n_after).repeat(n_pictures, 1, 1)),
        }
        if options.train_kv:
            for name, projection in self.sd.unet.text_projections.items():
                self.parameters[name] = nn.Parameter(torch.zeros_like(projection.weight, dtype=torch.float32))

    def _training_prompt(self) -> Tokens:
        """The prompt of every picture, with its first picture's contexts as they start."""
        parameters = self.parameters
        vectors: dict[str, Tensor] = {_BEFORE: parameters["before"][0], _AFTER: parameters["after"][0]}
        vectors[self.options.placeholder.lower()] = parameters["tokens"]
        return self.sd.text_encoder.tokenize(f"{_BEFORE} {self.options.placeholder} {self.noun} {_AFTER}", vectors)

    def optimizer(self) -> torch.optim.Optimizer:
        contexts = [self.parameters["before"], self.parameters["after"]]
        others = [parameter for name, parameter in self.parameters.items() if name not in ("before", "after")]
        groups = [{"params": others}, {"params": contexts, "lr": self.options.context_learning_rate}]
        return torch.optim.AdamW(groups, lr=self.options.learning_rate, weight_decay=0.0)

    def loss(self, part: int) -> Tensor:
        """Squared error of the noise prediction on micro-batch ``part``, and on as many class pictures."""
        seed, size = self.options.seed, self.options.batch_size
        batch = self.pictures.batch(seed, part * size, size)
        generator = make_generator(seed, 2, part)
        prompts, latents = [self._prompt(picture) for picture in batch.pictures], batch.latents
        if self.prior is not None:
            chosen = torch.randint(0, len(self.prior), (size,), generator=generator)
            prompts += [self.class_prompt] * size
            latents = torch.cat([latents, self.prior[chosen.to(latents.device)]])
        noised = self.noiser(latents, generator)
        with autocast(self.sd):
            text = self._text_kv(self.sd.text_encoder.transform(prompts))
            condition = Conditioning(Batch(text), self.unet.time_shifts(noised.timesteps))
            predicted = self.unet.denoise(noised.latents.to(self.sd.dtype), condition)
        error = (predicted.float() - noised.noise).square()
        loss = weighted_mean(error[:size], batch.weights)
        return loss if self.prior is None else loss + self.options.prior_weight * error[size:].mean()

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
            placeholder=self.options.placeholder,
            changes=changes,
        )

    def sample(self) -> Image.Image:
        """For every sample prompt and fixed seed, the model's own picture of the noun above the concept's."""
        custom, n_seeds = ICO([self.concept(0)]), len(SAMPLE_SEEDS)
        plain = [" ".join(prompt.replace(self.options.placeholder, "").split()) for prompt in self.sample_prompts]
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


def initial_tokens(text: TextEncoder, count: int, words: str | None, seed: int) -> Tensor:
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
