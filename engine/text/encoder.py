"""The text side: prompts to tokens to CLIP embeddings (Radford et al. 2021, arXiv:2103.00020)."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_integer
from ..warn import warn
from .chunks import LONG_PROMPTS, Piece, segments, split
from .editing import unedited
from .weighting import WEIGHTINGS, WeightedPrompt, apply_weights, parse_weights


@dataclass(frozen=True, slots=True)
class Tokens:
    """One tokenized prompt: chunks of the encoder's length, each with begin and end tokens, padded, side by side.

    Attributes:
        text: the prompt without weighting marks.
        ids: token ids.
        weights: weight of each token.
        spans: (start, end) in ``text`` of each prompt token; where they are in ``ids`` is ``positions``.
        sizes: how many prompt tokens each chunk has.
        cut_off: the end of the prompt that did not fit, or "".
        learned: positions whose embedding is not the vocabulary's, and their vectors (E,).
    """

    text: str
    ids: tuple[int, ...]
    weights: tuple[float, ...]
    spans: tuple[tuple[int, int], ...]
    sizes: tuple[int, ...]
    cut_off: str
    learned: tuple[tuple[int, Tensor], ...] = ()

    @property
    def positions(self) -> list[int]:
        """Of the prompt's tokens among ``ids``; a chunk's begin token comes before them, its end token behind."""
        length = len(self.ids) // len(self.sizes)
        return [first * length + i for first, size in enumerate(self.sizes) for i in range(1, size + 1)]

    def filled(self, chunks: int, empty: Tokens) -> Tokens:
        """The same with chunks of the empty prompt behind it, so that there are at least so many."""
        more = chunks - len(self.sizes)
        if more <= 0:
            return self
        ids, weights = self.ids + more * empty.ids, self.weights + more * empty.weights
        return replace(self, ids=ids, weights=weights, sizes=self.sizes + more * empty.sizes)


class TextEncoder:
    """CLIP's tokenizer and text transformer, both from transformers.

    Args:
        tokenizer: a fast ``CLIPTokenizer``.
        model: a ``CLIPTextModel``.
        embeddings: words of every prompt that stand for learned vectors, in lower case, and these (S, E).
    """

    def __init__(self, tokenizer: Any, model: Any, embeddings: Mapping[str, Tensor] | None = None) -> None:
        self.tokenizer, self.model, self.embeddings = tokenizer, model, dict(embeddings or {})
        self.max_length: int = model.config.max_position_embeddings
        self.width: int = model.config.hidden_size
        self._lock = threading.Lock()  # fast tokenizers refuse to be used by two threads at once
        self._learned = threading.local()
        self._empty_contexts: dict[int, Tensor] = {}  # (1, 77, E), by clip_skip
        model.get_input_embeddings().register_forward_hook(self._place_learned)
        self._fits = max(len(tokenizer), tokenizer.eos_token_id + 1) <= model.config.vocab_size

    def __call__(
        self, prompts: str | Sequence[str], weighting: str = "a1111", clip_skip: int = 0, long_prompts: str = "chunk"
    ) -> Tensor:
        """Tokenize and encode prompts, none of which may change over the steps; see ``tokenize`` and ``encode``."""
        given = [unedited(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
        return self.encode([self.tokenize(one, long_prompts=long_prompts) for one in given], weighting, clip_skip)

    def embeddings_in(self, *prompts: str) -> list[str]:
        """The names of the embeddings that prompts use, in lower case."""
        texts = [parse_weights(prompt).text for prompt in prompts if self.embeddings]
        return sorted({word.group().lower() for text in texts for word in find_words(text, self.embeddings)})

    def with_weights(self, weights: Mapping[str, Tensor]) -> TextEncoder:
        """Another encoder with other values of some parameters; it shares the rest, and the tokenizer."""
        with torch.device("meta"):
            model = type(self.model)(self.model.config)
        model.load_state_dict(self.model.state_dict(keep_vars=True) | weights, strict=True, assign=True)
        for name, buffer in self.model.named_buffers():  # position ids, which no state dict has
            owner, _, own = name.rpartition(".")
            setattr(model.get_submodule(owner), own, buffer)
        other = TextEncoder(self.tokenizer, model.eval().requires_grad_(False), self.embeddings)
        other._lock = self._lock
        return other

    def tokenize(
        self,
        prompt: str | WeightedPrompt,
        vectors: Mapping[str, Tensor] | None = None,
        long_prompts: str = "chunk",
    ) -> Tokens:
        """Tokenize one prompt.

        Args:
            prompt: text with weighting marks, or what ``parse_weights`` makes of it.
            vectors: words that stand for learned tokens, in lower case, and their vectors (S, E).
            long_prompts: "chunk" makes further chunks of what exceeds the encoder's length, see ``chunks.split``;
                "truncate" cuts it off and tells so in the result; "error" raises ``ValueError``. The word BREAK ends a
                chunk, but is a word like others to "truncate".
        """
        # told here, not at load: the UNet and VAE of a single file can be used without its tokenizer
        if not self._fits:
            size = self.model.config.vocab_size
            raise ValueError(
                f"the tokenizer's ids must fit the text encoder's {size} tokens, got {len(self.tokenizer)}; give the "
                "model's own tokenizer with load(..., config=folder)"
            )
        check_choice("long_prompts", long_prompts, LONG_PROMPTS)
        weighted = parse_weights(prompt) if isinstance(prompt, str) else prompt
        room, vectors = self.max_length - 2, self._vectors(vectors or {})
        parts = [(0, len(weighted.text))] if long_prompts == "truncate" else segments(weighted.text)
        pieces = [self._pieces(weighted.text[:end], start, vectors) for start, end in parts]
        cut_off = ""
        if len(pieces) == 1 and len(pieces[0]) <= room:
            chunks = pieces
        elif long_prompts == "truncate":
            chunks, cut_off = [pieces[0][:room]], weighted.text[pieces[0][room].span[0] :]
        else:
            chunks = split(pieces, room, self._comma)
        if long_prompts == "error" and len(chunks) > 1:
            rule = f"prompts must fit into one chunk of {room} tokens with long_prompts='error'"
            raise ValueError(f"{rule}, got {sum(map(len, chunks))} tokens in {len(chunks)} chunks: {weighted.text!r}")
        return self._tokens(weighted, chunks, cut_off)

    def _tokens(self, weighted: WeightedPrompt, chunks: Sequence[Sequence[Piece]], cut_off: str) -> Tokens:
        tokenizer, room = self.tokenizer, self.max_length - 2
        ids, weights, learned = list[int](), list[float](), list[tuple[int, Tensor]]()
        for chunk in chunks:
            padding, first = room - len(chunk), len(ids) + 1
            learned += [(at, piece.vector) for at, piece in enumerate(chunk, first) if piece.vector is not None]
            ids += [tokenizer.bos_token_id, *(piece.id for piece in chunk), tokenizer.eos_token_id]
            ids += [tokenizer.pad_token_id] * padding
            weights += [1.0, *(weighted.weights[piece.span[0]] for piece in chunk), *[1.0] * (padding + 1)]
        return Tokens(
            text=weighted.text,
            ids=tuple(ids),
            weights=tuple(weights),
            spans=tuple(piece.span for chunk in chunks for piece in chunk),
            sizes=tuple(map(len, chunks)),
            cut_off=cut_off,
            learned=tuple(learned),
        )

    @torch.no_grad()
    def encode(self, prompts: Sequence[Tokens], weighting: str = "a1111", clip_skip: int = 0) -> Tensor:
        """Encode prompts to (B, n * 77, E) in the model's dtype; warns, quoting it, about text that did not fit.

        Args:
            prompts: tokenized; n is the chunks of the longest, and the others are filled with empty ones.
            weighting: by which rule token weights act in each chunk, "a1111" or "comfyui"; see
                ``weighting.apply_weights``.
            clip_skip: how many of the last layers are left out.
        """
        check_choice("weighting", weighting, WEIGHTINGS)
        self.check_clip_skip(clip_skip)
        for prompt in prompts:
            if prompt.cut_off:
                rule = f"the prompt is longer than the text encoder's {self.max_length} tokens"
                warn(f"{rule}; this part was cut off: {prompt.cut_off!r}")
        n_chunks = max(len(prompt.sizes) for prompt in prompts)
        if n_chunks > 1:
            prompts = [prompt.filled(n_chunks, self.empty) for prompt in prompts]
        context = self.transform(prompts, clip_skip)
        weights = torch.tensor([prompt.weights for prompt in prompts], device=context.device)
        if (weights == 1.0).all():
            return context
        chunks, own = (x.unflatten(1, (n_chunks, -1)).flatten(0, 1) for x in (context, weights))
        if clip_skip not in self._empty_contexts:
            self._empty_contexts[clip_skip] = self.transform([self.empty], clip_skip)
        weighted = apply_weights(chunks, own, self._empty_contexts[clip_skip], weighting)
        return weighted.reshape(context.shape)

    def check_clip_skip(self, clip_skip: int) -> int:
        """Raise ``ValueError`` unless a layer would be left."""
        n_layers = self.model.config.num_hidden_layers
        if check_integer("clip_skip", clip_skip, 0) >= n_layers:
            raise ValueError(f"clip_skip must leave one of the text encoder's {n_layers} layers, got {clip_skip}")
        return clip_skip

    @cached_property
    def empty(self) -> Tokens:
        """The empty prompt, which fills shorter ones up."""
        return self.tokenize("")

    @cached_property
    def _comma(self) -> int | None:
        return self.tokenizer.get_vocab().get(",</w>")

    def transform(self, prompts: Sequence[Tokens], clip_skip: int = 0) -> Tensor:
        """The text transformer's hidden state (B, n * 77, E) of prompts of n chunks each, which do not see one another.

        It is the last one, or that before the last ``clip_skip`` layers, through the last norm. Differentiable with
        respect to learned vectors: token embeddings are put together first and positions added after, so that every
        vector is at its true one.
        """
        n_chunks, length = len(prompts[0].sizes), self.max_length
        learned = [(row, at, vector) for row, prompt in enumerate(prompts) for at, vector in prompt.learned]
        places = [(row * n_chunks + at // length, at % length) for row, at, _ in learned]
        vectors = [vector for *_, vector in learned]
        self._learned.now = (places, vectors) if places else None
        try:
            ids = torch.tensor([prompt.ids for prompt in prompts], device=self.model.device).view(-1, length)
            if clip_skip:
                hidden = self.model(input_ids=ids, output_hidden_states=True).hidden_states[-1 - clip_skip]
                hidden = getattr(self.model, "text_model", self.model).final_layer_norm(hidden)
            else:
                hidden = self.model(input_ids=ids).last_hidden_state
            return hidden.reshape(len(prompts), n_chunks * length, -1)
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

    def _vectors(self, vectors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Learned words of one prompt and of all; each must be one alone, and fit into a chunk."""
        if both := sorted(self.embeddings.keys() & vectors.keys()):
            raise ValueError(f"a placeholder must not be the name of an embedding too, got {both[0]!r}")
        most = self.max_length - 2
        for name, tokens in vectors.items():
            if len(tokens) > most:
                raise ValueError(f"a word must stand for at most {most} vectors, got {len(tokens)}: {name!r}")
        return self.embeddings | dict(vectors)

    def _pieces(self, text: str, start: int, vectors: Mapping[str, Tensor]) -> list[Piece]:
        """All tokens of a text from ``start`` on; a learned one has the end token's id, whose embedding it replaces."""
        pieces: list[Piece] = []
        for word in find_words(text, vectors, start):
            pieces += self._vocabulary_pieces(text, start, word.start())
            pieces += [Piece(self.tokenizer.eos_token_id, word.span(), one) for one in vectors[word.group().lower()]]
            start = word.end()
        return pieces + self._vocabulary_pieces(text, start, len(text))

    def _vocabulary_pieces(self, text: str, start: int, end: int) -> list[Piece]:
        """Tokens of a part of a text that holds no learned ones."""
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        with self._lock:
            encoded = self.tokenizer(text[start:end], **options)
        spans = ((start + first, start + stop) for first, stop in encoded["offset_mapping"])
        return [Piece(token, span, None) for token, span in zip(encoded["input_ids"], spans, strict=True)]


def find_words(text: str, words: Mapping[str, Any], start: int = 0) -> list[re.Match[str]]:
    """Where any of some words stand in a text, not within others; the longest that fits, in any case."""
    if not words:
        return []
    names = "|".join(re.escape(name) for name in sorted(words, key=len, reverse=True))
    return list(re.compile(rf"(?<!\w)(?:{names})(?!\w)", re.IGNORECASE).finditer(text, start))
