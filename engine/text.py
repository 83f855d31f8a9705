"""The text side: prompts to tokens to CLIP embeddings (Radford et al. 2021, arXiv:2103.00020)."""

from __future__ import annotations

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
        largest = max(len(tokenizer) - 1, tokenizer.eos_token_id, tokenizer.pad_token_id)
        if largest >= model.config.vocab_size:
            rule = f"the tokenizer's ids must fit the text encoder's vocabulary of {model.config.vocab_size}"
            raise ValueError(f"{rule}, got ids up to {largest}")

    def tokenize(self, prompt: str) -> Tokens:
        """Tokenize one prompt; what exceeds the encoder's length is cut off and reported in the result."""
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

        Token weights scale the embeddings, after which each prompt's mean is restored, as A1111 does.
        """
        tokens = [self.tokenize(prompt) for prompt in prompts]
        for prompt in tokens:
            if prompt.cut_off:
                rule = f"the prompt is longer than the text encoder's {self.max_length} tokens"
                warnings.warn(f"{rule}; this part was cut off: {prompt.cut_off!r}", stacklevel=2)
        device = self.model.device
        ids = torch.tensor([prompt.ids for prompt in tokens], device=device)
        context = self.model(input_ids=ids).last_hidden_state
        if any(weight != 1.0 for prompt in tokens for weight in prompt.weights):
            weights = torch.tensor([prompt.weights for prompt in tokens], device=device)
            context = _weighted(context, weights)
        return context


def _weighted(context: Tensor, weights: Tensor) -> Tensor:
    exact = context.float()
    scaled = exact * weights[:, :, None]
    restore = exact.mean(dim=(1, 2), keepdim=True) / scaled.mean(dim=(1, 2), keepdim=True)
    plain = (weights == 1.0).all(dim=1)[:, None, None]  # a plain prompt beside a weighted one keeps its bits
    return torch.where(plain, context, (scaled * restore).to(context.dtype))
