"""The text side: prompts to tokens to CLIP embeddings (Radford et al. 2021, arXiv:2103.00020)."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .prompt import parse_weights


@dataclass(frozen=True, slots=True)
class Tokens:
    """One tokenized prompt, begin and end tokens included, padded to the encoder's length.

    Attributes:
        text: the prompt without weighting marks.
        ids: token ids.
        weights: weight of each token.
        spans: (start, end) in ``text`` of each prompt token; the first is at position 1 of ``ids``.
        cut_off: the end of the prompt that did not fit, or "".
    """

    text: str
    ids: tuple[int, ...]
    weights: tuple[float, ...]
    spans: tuple[tuple[int, int], ...]
    cut_off: str


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
        self._fits = max(len(tokenizer), tokenizer.eos_token_id + 1) <= model.config.vocab_size

    def tokenize(self, prompt: str) -> Tokens:
        """Tokenize one prompt; what exceeds the encoder's length is cut off and reported in the result."""
        if (
            not self._fits
        ):  # told here, not at load: the UNet and VAE of a single file can be used without its tokenizer
            size = self.model.config.vocab_size
            raise ValueError(
                f"the tokenizer's ids must fit the text encoder's {size} tokens, got {len(self.tokenizer)}; give the "
                "model's own tokenizer with load(..., config=folder)"
            )
        weighted = parse_weights(prompt)
        with self._lock:
            encoded = self.tokenizer(
                weighted.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
        room = self.max_length - 2
        ids, spans = encoded["input_ids"], [tuple(span) for span in encoded["offset_mapping"]]
        cut_off = weighted.text[spans[room][0] :] if len(ids) > room else ""
        ids, spans = ids[:room], spans[:room]
        padding = room - len(ids)
        tokenizer = self.tokenizer
        return Tokens(
            text=weighted.text,
            ids=(tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * padding),
            weights=(1.0, *(weighted.weights[start] for start, _ in spans), *[1.0] * (padding + 1)),
            spans=tuple(spans),
            cut_off=cut_off,
        )

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts to (B, 77, E) in the model's dtype; warns, quoting it, about text that did not fit.

        A token of weight w gets ``empty + w (embedding - empty)``, where ``empty`` is the empty prompt's embedding at
        its position: ComfyUI's rule. (A1111 scales embeddings and then restores their mean, which is near zero.)
        """
        tokens = [self.tokenize(prompt) for prompt in prompts]
        for prompt in tokens:
            if prompt.cut_off:
                rule = f"the prompt is longer than the text encoder's {self.max_length} tokens"
                warnings.warn(f"{rule}; this part was cut off: {prompt.cut_off!r}", stacklevel=2)
        context = self._transform([prompt.ids for prompt in tokens])
        weights = torch.tensor([prompt.weights for prompt in tokens], device=context.device)[:, :, None]
        if (weights == 1.0).all():
            return context
        empty = self._transform([self.tokenize("").ids]).float()
        weighted = empty + weights * (context.float() - empty)
        return torch.where(weights == 1.0, context, weighted.to(context.dtype))

    def _transform(self, ids: Sequence[tuple[int, ...]]) -> Tensor:
        return self.model(input_ids=torch.tensor(ids, device=self.model.device)).last_hidden_state


def word_pattern(words: str) -> str:
    """A regular expression for a word or words, not within others."""
    return rf"(?<!\w){re.escape(words)}(?!\w)"


def find_noun(text: Tokens, noun: str, occurrence: int | None = None) -> list[int]:
    """Positions of the tokens of a word or words in a tokenized prompt; the begin token is at 0.

    Raises:
        ValueError: it is absent, is there more than once and no occurrence is given, or does not fit.
    """
    found = list(re.finditer(word_pattern(noun), text.text, re.IGNORECASE))
    if not found:
        raise ValueError(f"the prompt must contain {noun!r}, got {text.text!r}")
    if occurrence is None and len(found) > 1:
        rule = f"the prompt has {noun!r} {len(found)} times; say which with occurrences"
        raise ValueError(f"{rule}, got {text.text!r}")
    if occurrence is not None and occurrence >= len(found):
        raise ValueError(f"the prompt has {noun!r} {len(found)} times, got occurrence {occurrence}")
    start, end = found[occurrence or 0].span()
    last = max((stop for _, stop in text.spans), default=0)
    if end > last:
        rule = f"{noun!r} must be within the text encoder's {len(text.ids)} tokens"
        raise ValueError(f"{rule}; it was cut off from {text.text!r}")
    return [i + 1 for i, (first, stop) in enumerate(text.spans) if first < end and stop > start]
