"""The text side: prompts to tokens to CLIP embeddings (Radford et al. 2021, arXiv:2103.00020)."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConceptFileError
from ..methods.concept import Concept
from .weighting import parse_weights


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt, and the concepts whose tokens it may hold and whose keys and values it gets."""

    prompt: str
    concepts: tuple[Concept, ...] = ()


@dataclass(frozen=True, slots=True)
class Tokens:
    """One tokenized prompt, begin and end tokens included, padded to the encoder's length.

    Attributes:
        text: the prompt without weighting marks.
        ids: token ids.
        weights: weight of each token.
        spans: (start, end) in ``text`` of each prompt token; the first is at position 1 of ``ids``.
        cut_off: the end of the prompt that did not fit, or "".
        learned: positions whose embedding is not the vocabulary's, and their vectors (E,).
    """

    text: str
    ids: tuple[int, ...]
    weights: tuple[float, ...]
    spans: tuple[tuple[int, int], ...]
    cut_off: str
    learned: tuple[tuple[int, Tensor], ...] = ()


class TextEncoder:
    """CLIP's tokenizer and text transformer, both from transformers.

    Args:
        tokenizer: a fast ``CLIPTokenizer``.
        model: a ``CLIPTextModel``.
    """

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.tokenizer, self.model = tokenizer, model
        self.max_length: int = model.config.max_position_embeddings
        self.width: int = model.config.hidden_size
        self._lock = threading.Lock()  # fast tokenizers refuse to be used by two threads at once
        self._learned = threading.local()
        model.get_input_embeddings().register_forward_hook(self._place_learned)
        self._fits = max(len(tokenizer), tokenizer.eos_token_id + 1) <= model.config.vocab_size

    def tokenize(self, prompt: str, concepts: Sequence[Concept] = ()) -> Tokens:
        """Tokenize one prompt; what exceeds the encoder's length is cut off and reported in the result.

        Args:
            prompt: text with weighting marks.
            concepts: whose placeholders stand for their tokens in it.

        Raises:
            ValueError: two concepts have one placeholder, or tokens that are not the encoder's width.
        """
        # told here, not at load: the UNet and VAE of a single file can be used without its tokenizer
        if not self._fits:
            size = self.model.config.vocab_size
            raise ValueError(
                f"the tokenizer's ids must fit the text encoder's {size} tokens, got {len(self.tokenizer)}; give the "
                "model's own tokenizer with load(..., config=folder)"
            )
        weighted = parse_weights(prompt)
        room = self.max_length - 2
        pieces = self._pieces(weighted.text, self._vectors(concepts))
        cut_off = weighted.text[pieces[room][1][0] :] if len(pieces) > room else ""
        pieces = pieces[:room]
        padding = room - len(pieces)
        tokenizer = self.tokenizer
        spans = tuple(span for _, span, _ in pieces)
        learned = tuple((at, vector) for at, (_, _, vector) in enumerate(pieces, 1) if vector is not None)
        return Tokens(
            text=weighted.text,
            ids=(
                tokenizer.bos_token_id,
                *(token for token, _, _ in pieces),
                tokenizer.eos_token_id,
                *[tokenizer.pad_token_id] * padding,
            ),
            weights=(1.0, *(weighted.weights[start] for start, _ in spans), *[1.0] * (padding + 1)),
            spans=spans,
            cut_off=cut_off,
            learned=learned,
        )

    @torch.no_grad()
    def encode(self, prompts: Sequence[Tokens]) -> Tensor:
        """Encode prompts to (B, 77, E) in the model's dtype; warns, quoting it, about text that did not fit.

        A token of weight w gets ``empty + w (embedding - empty)``, where ``empty`` is the empty prompt's embedding at
        its position: ComfyUI's rule. (A1111 scales embeddings and then restores their mean, which is near zero.)
        """
        for prompt in prompts:
            if prompt.cut_off:
                rule = f"the prompt is longer than the text encoder's {self.max_length} tokens"
                warnings.warn(f"{rule}; this part was cut off: {prompt.cut_off!r}", stacklevel=2)
        context = self.transform(prompts)
        weights = torch.tensor([prompt.weights for prompt in prompts], device=context.device)[:, :, None]
        if (weights == 1.0).all():
            return context
        empty = self.transform([self.tokenize("")]).float()
        weighted = empty + weights * (context.float() - empty)
        return torch.where(weights == 1.0, context, weighted.to(context.dtype))

    def transform(self, prompts: Sequence[Tokens]) -> Tensor:
        """The text transformer's last hidden state (B, 77, E), differentiable with respect to learned vectors.

        Token embeddings are put together first and positions added after, so that every vector is at its true one.
        """
        places = [(row, at) for row, prompt in enumerate(prompts) for at, _ in prompt.learned]
        vectors = [vector for prompt in prompts for _, vector in prompt.learned]
        self._learned.now = (places, vectors) if places else None
        try:
            ids = torch.tensor([prompt.ids for prompt in prompts], device=self.model.device)
            return self.model(input_ids=ids).last_hidden_state
        finally:
            self._learned.now = None

    def _place_learned(self, _module: nn.Module, _inputs: Any, embedded: Tensor) -> Tensor:
        """Put this thread's learned vectors among the token embeddings (B, 77, E)."""
        now = getattr(self._learned, "now", None)
        if now is None:
            return embedded
        places, vectors = now
        rows, columns = torch.tensor(places, device=embedded.device).unbind(1)
        return embedded.index_put((rows, columns), torch.stack(vectors).to(embedded))

    def _vectors(self, concepts: Sequence[Concept]) -> dict[str, Tensor]:
        """The tokens that each placeholder, in lower case, stands for."""
        vectors = dict[str, Tensor]()
        for concept in concepts:
            if concept.tokens is None:
                continue
            name = concept.placeholder.lower()
            if name in vectors:
                rule = "concepts of one request must have placeholders of their own (dataclasses.replace sets one)"
                raise ValueError(f"{rule}, got {concept.placeholder!r} twice")
            if concept.tokens.shape[1] != self.width:
                rule = f"tokens of concept {concept.name!r} must be {self.width} wide for this model"
                raise ConceptFileError(f"{rule}, got {concept.tokens.shape[1]}")
            vectors[name] = concept.tokens
        return vectors

    def _pieces(self, text: str, vectors: Mapping[str, Tensor]) -> list[tuple[int, tuple[int, int], Tensor | None]]:
        """Ids, spans in the text, and learned vectors. Those have the end token's id, whose embedding they replace."""
        pieces: list[tuple[int, tuple[int, int], Tensor | None]] = []
        start = 0
        names = "|".join(word_pattern(name) for name in sorted(vectors, key=len, reverse=True))
        for found in [*re.finditer(names, text, re.IGNORECASE), None] if vectors else [None]:
            end = len(text) if found is None else found.start()
            with self._lock:
                encoded = self.tokenizer(
                    text[start:end], add_special_tokens=False, return_offsets_mapping=True, verbose=False
                )
            spans = ((start + first, start + stop) for first, stop in encoded["offset_mapping"])
            pieces += [(token, span, None) for token, span in zip(encoded["input_ids"], spans, strict=True)]
            if found is not None:
                pieces += [
                    (self.tokenizer.eos_token_id, found.span(), vector) for vector in vectors[found.group().lower()]
                ]
                start = found.end()
        return pieces


def word_pattern(words: str) -> str:
    """A regular expression for a word or words, not within others."""
    return rf"(?<!\w){re.escape(words)}(?!\w)"


def find_noun(text: Tokens, noun: str, occurrence: int | None = None) -> list[int]:
    """Positions of the tokens of a word or words in a tokenized prompt; the begin token is at 0.

    Raises:
        ValueError: it is absent, is there more than once and no occurrence is given, or does not fit.
    """
    return find_phrase(text, word_pattern(noun), noun, occurrence)


def find_phrase(text: Tokens, pattern: str, name: str, occurrence: int | None = None) -> list[int]:
    """The same for what a regular expression matches, which messages call ``name``."""
    found = list(re.finditer(pattern, text.text, re.IGNORECASE))
    if not found:
        raise ValueError(f"the prompt must contain {name!r}, got {text.text!r}")
    if occurrence is None and len(found) > 1:
        rule = f"the prompt has {name!r} {len(found)} times; say which with occurrences"
        raise ValueError(f"{rule}, got {text.text!r}")
    if occurrence is not None and occurrence >= len(found):
        raise ValueError(f"the prompt has {name!r} {len(found)} times, got occurrence {occurrence}")
    start, end = found[occurrence or 0].span()
    last = max((stop for _, stop in text.spans), default=0)
    if end > last:
        rule = f"{name!r} must be within the text encoder's {len(text.ids)} tokens"
        raise ValueError(f"{rule}; it was cut off from {text.text!r}")
    return [i + 1 for i, (first, stop) in enumerate(text.spans) if first < end and stop > start]
