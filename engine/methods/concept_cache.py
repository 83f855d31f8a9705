"""What concepts become on one model, computed once for as long as a concept lives: residuals, keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..errors import ConceptFileError, NonFiniteError
from ..models.conditioning import TextKV
from ..models.unet import UNet2DConditionModel
from ..text.encoder import TextEncoder, Tokens
from ..text.weighting import WeightedPrompt, parse_weights
from .concept import Change, Concept
from .fingerprint import check_base, fingerprint
from .infusion import project


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt, the concepts whose tokens it may hold and whose keys and values it gets, and its least chunks."""

    prompt: WeightedPrompt
    concepts: tuple[Concept, ...] = ()
    chunks: int = 1


@dataclass(frozen=True, slots=True)
class _Kept:
    """What was made of a concept, and of which tensors, in which versions; held, so that no id is given again."""

    versions: list[tuple[str, int, int]]
    tensors: list[tuple[str, Tensor]]
    made: dict[str, Any]


class ConceptCache:
    """The concepts of one model. An edit of a concept's tensors in place is noticed, and what it made computed anew."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet = unet
        self._kept: WeakKeyDictionary[Concept, _Kept] = WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._kept)

    @cached_property
    def fingerprint(self) -> tuple[float, ...]:
        """Tells base models apart; see ``fingerprint.fingerprint``."""
        return fingerprint(self.unet)

    def residuals(self, concept: Concept) -> tuple[Tensor, ...]:
        """Per cross-attention layer, the projected residual (H, C) of an Infusion concept; see ``infusion.project``."""

        def make() -> tuple[Tensor, ...]:
            projected = project(concept, self.unet)
            check_base(concept, self.fingerprint)
            return projected

        return self._keep(concept, "residuals", make)

    def changes(self, concept: Concept) -> Mapping[str, Change]:
        """A concept's changes of the text's projections, in the weights' device and dtype.

        Raises:
            ConceptFileError: they do not fit the model. Ones of another model of the same sizes, told by its
                fingerprint, are used with a warning.
        """
        return self._keep(concept, "changes", lambda: self._fit_changes(concept))

    def text_kv(self, texts: Sequence[Text], context: Tensor) -> TextKV:
        """Per cross-attention layer, keys and values (B, S, C) of encoded texts, with what their concepts change.

        ``K = W_K c + sum_s dW_K,s c`` for the encoded text c of ``context`` (B, S, E), and so for V (ICO, section 3.1).
        """
        projected = self.unet.text_kv(context)
        context = context.to(self.unet.conv_in.weight.dtype)
        rows = dict(zip(self.unet.text_projections, (tensor for pair in projected for tensor in pair), strict=True))
        for i, text in enumerate(texts):
            for concept in text.concepts:
                for name, change in self.changes(concept).items():
                    rows[name][i] += change(context[i])
        return projected

    def _keep(self, concept: Concept, what: str, make: Callable[[], Any]) -> Any:
        tensors = concept.tensors()
        versions = [(name, id(x), 0 if x.is_inference() else x._version) for name, x in tensors]
        kept = self._kept.get(concept)
        if kept is None or kept.versions != versions:
            kept = self._kept[concept] = _Kept(versions, tensors, {})
        if what not in kept.made:
            kept.made[what] = make()
        return kept.made[what]

    def _fit_changes(self, concept: Concept) -> dict[str, Change]:
        for name, change in concept.changes.items():
            if name not in self.unet.text_projections:
                raise ConceptFileError(f"concept {concept.name!r}: this model has no cross-attention projection {name}")
            expected = tuple(self.unet.text_projections[name].weight.shape)
            if change.shape != expected:
                rule = f"concept {concept.name!r}: {name}: this model's is {expected}"
                raise ConceptFileError(f"{rule}, found {change.shape}")
        check_base(concept, self.fingerprint)
        like = self.unet.conv_in.weight
        return {name: change.to(like.device, like.dtype) for name, change in concept.changes.items()}


class Texts:
    """The texts of one request: each is parsed, tokenized and encoded once, whoever asks for it.

    Args:
        encoder: of the model.
        long_prompts: see ``TextEncoder.tokenize``.
        clip_skip: see ``TextEncoder.encode``.
    """

    def __init__(self, encoder: TextEncoder, long_prompts: str = "chunk", clip_skip: int = 0) -> None:
        self.encoder, self.long_prompts, self.clip_skip = encoder, long_prompts, encoder.check_clip_skip(clip_skip)
        self._parsed: dict[str, WeightedPrompt] = {}
        self._tokens: dict[Text, Tokens] = {}

    def text(self, prompt: str, concepts: tuple[Concept, ...] = ()) -> Text:
        if prompt not in self._parsed:
            self._parsed[prompt] = parse_weights(prompt)
        return Text(self._parsed[prompt], concepts)

    def tokens(self, text: Text) -> Tokens:
        if text not in self._tokens:
            if text.chunks > 1:
                tokens = self.tokens(replace(text, chunks=1)).filled(text.chunks, self.encoder.empty)
            else:
                vectors = placeholders(text.concepts, self.encoder.width)
                tokens = self.encoder.tokenize(text.prompt, vectors, self.long_prompts)
            self._tokens[text] = tokens
        return self._tokens[text]

    def encode(self, texts: Sequence[Text], weighting: str) -> Tensor:
        """(B, S, E), where texts of fewer tokens are repeated up to their least common multiple S; see ``keys.py``.

        Raises:
            NonFiniteError: the text encoder produced NaN or infinity.
        """
        tokens = [self.tokens(text) for text in texts]
        lengths = [len(one.ids) for one in tokens]
        n_keys, encoded = math.lcm(*lengths), dict[int, Tensor]()
        for length in sorted(set(lengths)):
            rows = [i for i, own in enumerate(lengths) if own == length]
            context = self.encoder.encode([tokens[i] for i in rows], weighting, self.clip_skip)
            encoded |= zip(rows, context.repeat(1, n_keys // length, 1), strict=True)
        context = torch.stack([encoded[i] for i in range(len(texts))])
        finite = torch.isfinite(context).flatten(1).all(dim=1).tolist()
        if not all(finite):
            prompt = texts[finite.index(False)].prompt.text
            raise NonFiniteError(
                f"the text encoder produced NaN or infinity in {context.dtype} for the text {prompt!r}"
            )
        return context


def placeholders(concepts: Sequence[Concept], width: int) -> dict[str, Tensor]:
    """The tokens (S, ``width``) that each concept's placeholder, in lower case, stands for.

    Raises:
        ValueError: two concepts have one placeholder.
        ConceptFileError: tokens are not ``width`` wide.
    """
    vectors = dict[str, Tensor]()
    for concept in concepts:
        if concept.tokens is None:
            continue
        name = concept.placeholder.lower()
        if name in vectors:
            rule = "concepts of one request must have placeholders of their own (dataclasses.replace sets one)"
            raise ValueError(f"{rule}, got {concept.placeholder!r} twice")
        if concept.tokens.shape[1] != width:
            rule = f"tokens of concept {concept.name!r} must be {width} wide for this model"
            raise ConceptFileError(f"{rule}, got {concept.tokens.shape[1]}")
        vectors[name] = concept.tokens
    return vectors
