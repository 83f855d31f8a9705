"""The text side: prompts to tokens to CLIP embeddings (Radford et al. 2021, arXiv:2103.00020)."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_choice
from ..warn import warn
from .weighting import WEIGHTINGS, WeightedPrompt, apply_weights, parse_weights


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


class _Piece(NamedTuple):
    """One token: its id, where in the text it is, and its vector where that is not the vocabulary's."""

    id: int
    span: tuple[int, int]
    vector: Tensor | None


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

    def with_weights(self, weights: Mapping[str, Tensor]) -> TextEncoder:
        """Another encoder with other values of some parameters; it shares the rest, and the tokenizer."""
        with torch.device("meta"):
            model = type(self.model)(self.model.config)
        model.load_state_dict(self.model.state_dict(keep_vars=True) | weights, strict=True, assign=True)
        for name, buffer in self.model.named_buffers():  # position ids, which no state dict has
            owner, _, own = name.rpartition(".")
            setattr(model.get_submodule(owner), own, buffer)
        other = TextEncoder(self.tokenizer, model.eval().requires_grad_(False))
        other._lock = self._lock
        return other

    def tokenize(self, prompt: str | WeightedPrompt, vectors: Mapping[str, Tensor] | None = None) -> Tokens:
        """Tokenize one prompt; what exceeds the encoder's length is cut off and reported in the result.

        Args:
            prompt: text with weighting marks, or what ``parse_weights`` makes of it.
            vectors: words that stand for learned tokens, in lower case, and their vectors (S, E).
        """
        # told here, not at load: the UNet and VAE of a single file can be used without its tokenizer
        if not self._fits:
            size = self.model.config.vocab_size
            raise ValueError(
                f"the tokenizer's ids must fit the text encoder's {size} tokens, got {len(self.tokenizer)}; give the "
                "model's own tokenizer with load(..., config=folder)"
            )
        weighted = parse_weights(prompt) if isinstance(prompt, str) else prompt
        room = self.max_length - 2
        pieces = self._pieces(weighted.text, vectors or {})
        cut_off = weighted.text[pieces[room].span[0] :] if len(pieces) > room else ""
        pieces = pieces[:room]
        padding, tokenizer = room - len(pieces), self.tokenizer
        ids = (tokenizer.bos_token_id, *(piece.id for piece in pieces), tokenizer.eos_token_id)
        return Tokens(
            text=weighted.text,
            ids=(*ids, *[tokenizer.pad_token_id] * padding),
            weights=(1.0, *(weighted.weights[piece.span[0]] for piece in pieces), *[1.0] * (padding + 1)),
            spans=tuple(piece.span for piece in pieces),
            cut_off=cut_off,
            learned=tuple((at, piece.vector) for at, piece in enumerate(pieces, 1) if piece.vector is not None),
        )

    @torch.no_grad()
    def encode(self, prompts: Sequence[Tokens], weighting: str = "a1111") -> Tensor:
        """Encode prompts to (B, 77, E) in the model's dtype; warns, quoting it, about text that did not fit.

        Args:
            prompts: tokenized.
            weighting: by which rule token weights act, "a1111" or "comfyui"; see ``weighting.apply_weights``.
        """
        check_choice("weighting", weighting, WEIGHTINGS)
        for prompt in prompts:
            if prompt.cut_off:
                rule = f"the prompt is longer than the text encoder's {self.max_length} tokens"
                warn(f"{rule}; this part was cut off: {prompt.cut_off!r}")
        context = self.transform(prompts)
        weights = torch.tensor([prompt.weights for prompt in prompts], device=context.device)
        if (weights == 1.0).all():
            return context
        return apply_weights(context, weights, self._empty, weighting)

    @cached_property
    def _empty(self) -> Tensor:
        """The empty prompt's embedding (1, 77, E)."""
        return self.transform([self.tokenize("")])

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

    def _pieces(self, text: str, vectors: Mapping[str, Tensor]) -> list[_Piece]:
        """All tokens of a text; a learned one has the end token's id, whose embedding it replaces."""
        pieces: list[_Piece] = []
        start = 0
        for word in _words(text, vectors):
            pieces += self._vocabulary_pieces(text, start, word.start())
            pieces += [_Piece(self.tokenizer.eos_token_id, word.span(), one) for one in vectors[word.group().lower()]]
            start = word.end()
        return pieces + self._vocabulary_pieces(text, start, len(text))

    def _vocabulary_pieces(self, text: str, start: int, end: int) -> list[_Piece]:
        """Tokens of a part of a text that holds no learned ones."""
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        with self._lock:
            encoded = self.tokenizer(text[start:end], **options)
        spans = ((start + first, start + stop) for first, stop in encoded["offset_mapping"])
        return [_Piece(token, span, None) for token, span in zip(encoded["input_ids"], spans, strict=True)]


def _words(text: str, words: Mapping[str, Any]) -> list[re.Match[str]]:
    """Where any of some words stand in a text, not within others; the longest that fits, in any case."""
    if not words:
        return []
    names = "|".join(re.escape(name) for name in sorted(words, key=len, reverse=True))
    return list(re.finditer(rf"(?<!\w)(?:{names})(?!\w)", text, re.IGNORECASE))
