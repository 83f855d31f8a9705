"""The rivals of both methods, on the same trainer's loop, pictures and noise: what changes is what is learned.

The core stays immutable: a baseline that tunes the UNet's weights tunes a copy, and draws through an Engine of its own
that is loaded from the files it would be kept in.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import engine
from benchmarks.tinyworld.captions import full_prompt
from benchmarks.tinyworld.data import HELD_OUT_SEED, scene_at
from engine.methods.concept import Change
from engine.models.conditioning import Batch, Conditioning, TextKV
from engine.models.unet import UNet2DConditionModel
from engine.sampling.seeds import make_generator
from engine.text.encoder import Tokens
from engine.text.words import find_noun
from engine.train.denoising import Noised, Noiser, differentiable
from engine.train.ico import ICOObjective, initial_tokens
from engine.train.infusion import InfusionObjective
from engine.train.options import TrainOptions
from engine.train.pictures import Pictures
from engine.weights.checkpoint import EMBEDDED_MODEL

TEMPLATES = ("a photo of a {}", "a photo of the {}", "a picture of a {}", "a {}")
IDENTIFIER = "sks"
PLACEHOLDER = "V*"
LORA_RANK = 4
_LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
_GATE_TEMPERATURE, _GATE_BIAS, _DRAWING_BIAS, _INPUT_DECAY = 0.1, 0.75, 0.7, 0.99  # arXiv:2305.01644, section 4


@dataclass(frozen=True, slots=True)
class Drawer:
    """How a customised model is drawn with.

    Attributes:
        sd: the Engine.
        phrase: what prompts write for the concept.
        customization: what ``generate`` is given.
        n_bytes: of the file that would be kept, float16.
        everywhere: what acts on prompts that do not name the concept, for its side effects on them; None for nothing
            beyond what ``sd`` itself is.
    """

    sd: engine.Engine
    phrase: str
    customization: Any
    n_bytes: int
    everywhere: Any = None


class Baseline:
    """Noise prediction's squared error on reference pictures, and on class pictures where a prior is kept.

    Attributes:
        parameters: what is learned, float32, by name.
        phrase: what training prompts write for the concept.
    """

    phrase = PLACEHOLDER

    def __init__(self, sd: engine.Engine, images: Any, noun: str, options: TrainOptions, prior: Tensor | None = None):
        self.sd, self.noun, self.options, self.prior = sd, noun, options, prior
        self.pictures = Pictures(sd, images, None, sd.unet.config.sample_size * sd.vae.config.factor)
        self.noiser = Noiser(sd)
        self.unet = differentiable(sd.unet, False)
        self.parameters: dict[str, nn.Parameter] = {}
        self.settings = {"method": type(self).__name__, "noun": noun, **options.recorded()}
        self.start()
        self.class_texts = [sd.text_encoder.tokenize(template.format(noun)) for template in TEMPLATES]

    def start(self) -> None:
        """Make the parameters."""
        raise NotImplementedError

    def predict(self, noised: Noised, texts: Sequence[Tokens]) -> Tensor:
        """The noise prediction (B, 4, h, w), one text a row."""
        return self.denoise(noised, self.text_kv(self.sd.text_encoder.transform(texts)))

    def drawers(self, folder: Path, steps: int) -> dict[str, Drawer]:
        """Ways to draw with it as it is after ``steps`` steps, by name; files that they need go to ``folder``."""
        raise NotImplementedError

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters.values(), lr=self.options.learning_rate, weight_decay=0.0)

    def sample(self) -> Image.Image:
        raise NotImplementedError  # the study draws its own

    def loss(self, part: int) -> Tensor:
        seed, size = self.options.seed, self.options.batch_size
        latents, generator = self.pictures.batch(seed, part * size, size).latents, make_generator(seed, 2, part)
        chosen = torch.randint(0, len(TEMPLATES), (size,), generator=generator)
        texts = [self._text(TEMPLATES[i]) for i in chosen]
        if self.prior is not None:
            rows = torch.randint(0, len(self.prior), (size,), generator=generator)
            latents, texts = torch.cat([latents, self.prior[rows]]), texts + [self.class_texts[i] for i in chosen]
        noised = self.noiser(latents, generator)
        error = (self.predict(noised, texts) - noised.noise).square()
        return error[:size].mean() if self.prior is None else error[:size].mean() + error[size:].mean()

    def denoise(self, noised: Noised, text: TextKV) -> Tensor:
        return self.unet.denoise(noised.latents, Conditioning(Batch(text), self.unet.time_shifts(noised.timesteps)))

    def text_kv(self, context: Tensor) -> TextKV:
        """Keys and values of an encoded text, as they are now."""
        return self.unet.text_kv(context)

    def _text(self, template: str) -> Tokens:
        vectors = {PLACEHOLDER.lower(): self.parameters["tokens"]} if "tokens" in self.parameters else {}
        return self.sd.text_encoder.tokenize(template.format(self.phrase.format(self.noun)), vectors)

    def _embedding(self, word: str) -> Tensor:
        """(1, E): the vocabulary's own of a word of one token."""
        text = self.sd.text_encoder
        weight = cast(Tensor, text.model.get_input_embeddings().weight)
        (token,) = text.tokenize(word).ids[1 : 1 + len(text.tokenize(word).spans)]
        return weight[token].detach().float()[None].clone()


class TextualInversion(Baseline):
    """One token embedding in the noun's place (Gal et al. 2023, arXiv:2208.01618)."""

    def start(self) -> None:
        self.parameters = {"tokens": nn.Parameter(self._embedding(self.noun))}

    def drawers(self, folder: Path, steps: int) -> dict[str, Drawer]:  # noqa: ARG002
        tokens = self.parameters["tokens"].detach().clone()
        concept = engine.Concept(self.noun, base=self.sd.fingerprint, tokens=tokens, placeholder=PLACEHOLDER)
        return {"": Drawer(self.sd, PLACEHOLDER, engine.ICO([concept]), 2 * tokens.numel())}


class CustomDiffusion(Baseline):
    """A token before the noun, and W_K and W_V of cross-attention (Kumari et al. 2023, arXiv:2212.04488)."""

    phrase = f"{PLACEHOLDER} {{}}"

    def start(self) -> None:
        rare = initial_tokens(self.sd.text_encoder, 1, None, self.options.seed)
        self.parameters = {"tokens": nn.Parameter(rare)}
        for name, projection in self.sd.unet.text_projections.items():
            self.parameters[name] = nn.Parameter(torch.zeros_like(projection.weight))

    def text_kv(self, context: Tensor) -> TextKV:
        rows = [
            projection(context) + F.linear(context, self.parameters[name])
            for name, projection in self.unet.text_projections.items()
        ]
        return tuple(zip(rows[::2], rows[1::2], strict=True))

    def drawers(self, folder: Path, steps: int) -> dict[str, Drawer]:  # noqa: ARG002
        values = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        changes = {name: Change(value) for name, value in values.items() if name != "tokens"}
        concept = engine.Concept(self.noun, base=self.sd.fingerprint, tokens=values["tokens"], changes=changes)
        return _tuned(self.sd, concept)


class DreamBooth(Baseline):
    """All weights of the UNet, under a rare word before the noun (Ruiz et al. 2023, arXiv:2208.12242)."""

    phrase = f"{IDENTIFIER} {{}}"

    def start(self) -> None:
        self.unet = copy.deepcopy(self.unet).requires_grad_(True)
        self.parameters = dict(self.unet.named_parameters())

    def drawers(self, folder: Path, steps: int) -> dict[str, Drawer]:
        return {"": _retuned(self.unet.state_dict(), folder / f"{steps}", f"{IDENTIFIER} {self.noun}")}


class LoRA(Baseline):
    """Low-rank changes of all attention weights, by peft on diffusers' UNet (Hu et al. 2022, arXiv:2106.09685)."""

    phrase = f"{IDENTIFIER} {{}}"

    def start(self) -> None:
        from diffusers import UNet2DConditionModel
        from peft import LoraConfig

        net = UNet2DConditionModel.from_pretrained(EMBEDDED_MODEL / "unet", torch_dtype=torch.float32)
        net.requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(self.options.seed)
            net.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=_LORA_TARGETS))
        self.net = net.eval()
        self.parameters = {name: one for name, one in net.named_parameters() if one.requires_grad}

    def predict(self, noised: Noised, texts: Sequence[Tokens]) -> Tensor:
        context = self.sd.text_encoder.transform(texts)
        return self.net(noised.latents, noised.timesteps, encoder_hidden_states=context).sample

    def drawers(self, folder: Path, steps: int) -> dict[str, Drawer]:
        merged = copy.deepcopy(self.net)
        merged.fuse_lora()
        merged.unload_lora()
        drawer = _retuned(merged.state_dict(), folder / f"{steps}", f"{IDENTIFIER} {self.noun}")
        return {"": replace(drawer, n_bytes=2 * sum(one.numel() for one in self.parameters.values()))}


class Perfusion(Baseline):
    """Rank-one editing with keys locked to the noun's (Tewel et al. 2023, arXiv:2305.01644, sections 3 and 4).

    For an encoding e, the concept's encoding i and their similarity s under the inverse of the encodings' uncentred
    covariance, a projection gives ``W e - s W i + sigmoid((s - beta) / tau) o``. For keys, o is the noun's own key; for
    values it is learned.
    """

    def start(self) -> None:
        text = self.sd.text_encoder
        captions = [full_prompt(scene_at(i, HELD_OUT_SEED)) for i in range(200)]
        tokens = [text.tokenize(caption) for caption in captions]
        encoded = text.encode(tokens)
        corpus = torch.cat([row[: len(one.spans) + 2] for row, one in zip(encoded, tokens, strict=True)])
        self.metric = torch.linalg.pinv((corpus.T @ corpus / len(corpus)).double(), hermitian=True).float()
        nouns = [text.tokenize(template.format(self.noun)) for template in TEMPLATES]
        places = [find_noun(one, self.noun)[-1] for one in nouns]
        rows = text.encode(nouns)
        self.target = torch.stack([rows[i, at] for i, at in enumerate(places)]).mean(dim=0)
        self.parameters = {"tokens": nn.Parameter(self._embedding(self.noun))}
        self.locked = {}
        for name, projection in self.sd.unet.text_projections.items():
            output = projection(self.target).detach()
            if name.endswith("to_k"):
                self.locked[name] = output
            else:
                self.parameters[name] = nn.Parameter(output.clone())

    def optimizer(self) -> torch.optim.Optimizer:
        values = [one for name, one in self.parameters.items() if name != "tokens"]
        rate = self.options.learning_rate
        groups = [{"params": values}, {"params": [self.parameters["tokens"]], "lr": rate / 5}]
        return torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)

    def predict(self, noised: Noised, texts: Sequence[Tokens]) -> Tensor:
        context = self.sd.text_encoder.transform(texts)
        now = torch.stack([context[row, text.learned[0][0]] for row, text in enumerate(texts)]).mean(dim=0).detach()
        self.target = _INPUT_DECAY * self.target + (1 - _INPUT_DECAY) * now
        outputs = self.locked | {name: self.parameters[name] for name in self.parameters if name != "tokens"}
        return self.denoise(noised, _edited_kv(self.unet, self.metric, self.target, outputs, _GATE_BIAS, context))

    def drawers(self, folder: Path, steps: int) -> dict[str, Drawer]:  # noqa: ARG002
        values = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        tokens = values.pop("tokens")
        sd = engine.load()
        outputs = self.locked | values
        sd.unet.text_kv = partial(_edited_kv, sd.unet, self.metric, self.target, outputs, _DRAWING_BIAS)
        concept = engine.Concept(self.noun, base=sd.fingerprint, tokens=tokens, placeholder=PLACEHOLDER)
        n_numbers = tokens.numel() + self.target.numel() + sum(value.numel() for value in values.values())
        return {"": Drawer(sd, PLACEHOLDER, engine.ICO([concept]), 2 * n_numbers)}


class Infusion(InfusionObjective):
    """The library's own, in one space, drawn under both kinds of foundation."""

    def drawers(self, folder: Path, steps: int) -> dict[str, Drawer]:  # noqa: ARG002
        concept = self.concept(steps)
        n_bytes = 2 * sum(one.numel() for one in concept.residuals.values())
        customs = {kind: engine.Infusion([concept], foundation=kind) for kind in ("parallel", "shared")}
        return {kind: Drawer(self.sd, self.noun, one, n_bytes, one) for kind, one in customs.items()}


class ICO(ICOObjective):
    """The library's own, drawn alone, or with DCI where its scheme is for that."""

    def drawers(self, folder: Path, steps: int) -> dict[str, Drawer]:  # noqa: ARG002
        ways = _tuned(self.sd, self.concept(steps))
        return {"": ways["dci" if self.options.scheme == "dci" else ""]}


def _tuned(sd: engine.Engine, concept: engine.Concept) -> dict[str, Drawer]:
    """Tokens and changes of keys and values, alone and with DCI's second branch."""
    n_bytes = 2 * sum(tensor.numel() for _, tensor in concept.tensors())
    changes = engine.ICO([replace(concept, tokens=None)])
    ways = {"": engine.ICO([concept]), "dci": engine.DCI(concept)}
    phrase = f"{concept.placeholder} {concept.noun}"
    return {name: Drawer(sd, phrase, custom, n_bytes, changes) for name, custom in ways.items()}


def _retuned(state: Mapping[str, Tensor], folder: Path, phrase: str) -> Drawer:
    """Other UNet weights, through the files that they would be kept in."""
    shutil.copytree(EMBEDDED_MODEL, folder, dirs_exist_ok=True)
    weights = {name: weight.detach().half().contiguous() for name, weight in state.items()}
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors")
    sd = engine.load(folder)
    shutil.rmtree(folder)
    return Drawer(sd, phrase, None, 2 * sum(weight.numel() for weight in weights.values()))


def _edited_kv(
    unet: UNet2DConditionModel,
    metric: Tensor,
    target: Tensor,
    outputs: Mapping[str, Tensor],
    bias: float,
    context: Tensor,
) -> TextKV:
    """Keys and values of encodings (B, S, E) under Perfusion's edit; ``outputs`` by projection (C,)."""
    direction = metric @ target
    similarity = (context @ direction / (target @ direction))[..., None]
    gate = torch.sigmoid((similarity - bias) / _GATE_TEMPERATURE)
    rows = [
        projection(context) - similarity * projection(target) + gate * outputs[name]
        for name, projection in unet.text_projections.items()
    ]
    return tuple(zip(rows[::2], rows[1::2], strict=True))
