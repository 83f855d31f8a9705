"""What ties words to things in pre-training: words that mean their own phrase, and attend to their own place.

Stable Diffusion's text encoder saw 400 million captions, and its UNet billions of pictures: there a noun's attention
lies on its object. A tiny model, left alone, spreads every caption's meaning over the padding (a causal encoder's last
tokens know all) and attends evenly. Two terms bring the natural state about early:

- *meaning*: the encoder learns to give every word what it would have if it saw its own phrase alone, so that "car"
  carries the car, "beach" the beach, and the padding nothing;
- *place*: a noun's cross-attention map, averaged over heads, should reach 0.3 on its object and nothing elsewhere
  (compare the localisation loss of FastComposer, arXiv:2305.10431, eq. 4).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTokenizer

from benchmarks.tinyworld.captions import phrase_starts
from benchmarks.tinyworld.scene import Scene

_ON_OBJECT = 0.3
_LENGTH = 77
MAX_THINGS = 2


@dataclass(frozen=True, slots=True)
class Words:
    """Tokenised captions.

    Attributes:
        ids: (B, 77) int64.
        own_phrase: (B, 1, 77, 77) float32, 0 where a token may look and a large negative number elsewhere.
        nouns: (B, 2) int64, where each thing's noun ends.
        named: (B, 2) float32, 1 where a caption names its thing.
    """

    ids: Tensor
    own_phrase: Tensor
    nouns: Tensor
    named: Tensor


def read_words(tokenizer: CLIPTokenizer, captions: Sequence[str], scenes: Sequence[Scene]) -> Words:
    """Tokenise captions and find their phrases and nouns; a caption is its scene's or ""."""
    encoded = tokenizer(
        list(captions), padding="max_length", max_length=_LENGTH, truncation=True, return_offsets_mapping=True
    )
    phrases = torch.full((len(captions), _LENGTH), -1)  # end of text and padding are one phrase, that says nothing
    nouns, named = torch.zeros(len(captions), MAX_THINGS, dtype=torch.int64), torch.zeros(len(captions), MAX_THINGS)
    for row, (caption, scene, spans) in enumerate(zip(captions, scenes, encoded["offset_mapping"], strict=True)):
        starts = phrase_starts(caption)
        for at, (first, stop) in enumerate(spans):
            if stop > first:
                phrases[row, at] = sum(start <= first for start in starts)
        for j, thing in enumerate(scene.things):
            if found := re.search(rf"\b{thing.object}\b", caption):
                nouns[row, j] = max(at for at, (first, stop) in enumerate(spans) if first < found.end() <= stop)
                named[row, j] = 1.0
    visible = phrases[:, :, None] == phrases[:, None, :]
    visible[:, :, 0] = True
    visible &= torch.ones(_LENGTH, _LENGTH, dtype=torch.bool).tril()
    own_phrase = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[:, None]
    return Words(torch.tensor(encoded["input_ids"]), own_phrase, nouns, named)


def place_loss(columns: Sequence[Tensor], covered: Tensor, weights: Tensor) -> Tensor:
    """How far nouns' maps are from their objects, averaged over layers.

    Args:
        columns: per layer (B, N, T*H), heads last, of T nouns; N is a square.
        covered: (B, T, h, w) in [0, 1], the share of each position that the thing covers.
        weights: (B, T), how much each noun counts.
    """
    losses = []
    for layer in columns:
        side = int(layer.shape[1] ** 0.5)
        inside = F.adaptive_avg_pool2d(covered, side).flatten(2)
        share = layer.unflatten(-1, (covered.shape[1], -1)).mean(dim=-1).transpose(1, 2)  # (B, T, N)
        short = (inside * (_ON_OBJECT - share).clamp(min=0)).sum(-1) / inside.sum(-1).clamp(min=1e-3)
        astray = ((1 - inside) * share).sum(-1) / (1 - inside).sum(-1).clamp(min=1e-3)
        losses.append(((short + astray) * weights).sum() / weights.sum().clamp(min=1e-3))
    return torch.stack(losses).mean()
