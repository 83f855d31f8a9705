"""The judge of tinyworld pictures: a small network that names what a picture shows and matches pictures with captions.

It is the embedded model's counterpart of CLIP: trained on drawings alone (``benchmarks.tinyworld.train_evaluator``), it
measures pictures and takes no part in drawing them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..weights.checkpoint import ASSETS

EVALUATOR_PATH = ASSETS / "tinyworld" / "evaluator.safetensors"
_KNOWN = json.loads(EVALUATOR_PATH.with_suffix(".json").read_text())  # what it was trained to tell apart
NOUNS: tuple[str, ...] = tuple(_KNOWN["nouns"])
THING_CHOICES: dict[str, tuple[str, ...]] = {name: tuple(choices) for name, choices in _KNOWN["things"].items()}
PICTURE_CHOICES: dict[str, tuple[str, ...]] = {name: tuple(choices) for name, choices in _KNOWN["picture"].items()}
SIDE_PX = 64  # pictures are averaged down to this side

_ABSENT = 6.0  # log of 64 places, and then some: an untrained encoder says that most nouns are absent
_MAX_TOKENS = 32
_PADDING, _START = 0, 1
_WORD_IDS = {word: i for i, word in enumerate(_KNOWN["words"], start=2)}


class Logits(NamedTuple):
    """What the picture encoder says of B pictures.

    Attributes:
        objects: (B, nouns), above 0 where the noun is likely in the picture.
        things: per attribute of a thing (B, nouns, choices), meant for the nouns in the picture.
        picture: per attribute of the whole picture (B, choices).
        embedding: (B, E), of unit length.
    """

    objects: Tensor
    things: dict[str, Tensor]
    picture: dict[str, Tensor]
    embedding: Tensor


@dataclass(frozen=True, slots=True)
class Attributes:
    """What the evaluator sees in one picture.

    Attributes:
        confidence: log-odds of every noun being in the picture, the most certain first.
        colour, size, facing, position: per noun, as if it were in the picture.
        background, style: of the whole picture.
    """

    confidence: dict[str, float]
    colour: dict[str, str]
    size: dict[str, str]
    facing: dict[str, str]
    position: dict[str, str]
    background: str
    style: str

    @property
    def objects(self) -> tuple[str, ...]:
        """The nouns that are more likely in the picture than not, the most certain first."""
        return tuple(noun for noun, log_odds in self.confidence.items() if log_odds > 0)


class PictureEncoder(nn.Module):
    """A CNN down to 8 x 8 places. Every noun looks for its place, and reads its attributes there."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *_block(4, 32, 5, 2),
            *_block(32, 64, 3, 2),
            _Residual(64),
            *_block(64, width, 3, 2),
            _Residual(width),
            _Residual(width),
        )
        self.nouns = nn.Conv2d(width, len(NOUNS), 1)
        self.thing_widths = [len(choices) for choices in THING_CHOICES.values()]
        self.things = nn.Conv2d(width, sum(self.thing_widths), 1)
        self.mix = nn.Sequential(*_block(width, 160, 1, 1))
        self.picture_widths = [len(choices) for choices in PICTURE_CHOICES.values()]
        self.picture = nn.Linear(320, sum(self.picture_widths))
        self.project = nn.Linear(320, embedding)

    def forward(self, pictures: Tensor) -> Logits:
        pictures = F.adaptive_avg_pool2d(pictures, SIDE_PX)
        x = self.trunk(torch.cat([pictures, _fine_detail(pictures)], dim=1))
        places = self.nouns(x).flatten(2).float()  # (B, nouns, 64)
        said = self.things(x).flatten(2).float()  # (B, all choices, 64)
        things = places.softmax(dim=-1) @ said.transpose(1, 2)
        mixed = self.mix(x).flatten(2)
        features = torch.cat([mixed.mean(dim=-1), mixed.amax(dim=-1)], dim=1)
        picture = self.picture(features).float()
        return Logits(
            objects=places.logsumexp(dim=-1) - _ABSENT,
            things=dict(zip(THING_CHOICES, things.split(self.thing_widths, dim=-1), strict=True)),
            picture=dict(zip(PICTURE_CHOICES, picture.split(self.picture_widths, dim=-1), strict=True)),
            embedding=F.normalize(self.project(features).float(), dim=-1),
        )


class CaptionEncoder(nn.Module):
    """A two-layer transformer over a caption's words; words outside the captions' vocabulary are passed over."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.words = nn.Embedding(len(_WORD_IDS) + 2, width, padding_idx=_PADDING)
        self.positions = nn.Parameter(0.02 * torch.randn(_MAX_TOKENS, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.project = nn.Linear(width, embedding)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.positions[: ids.shape[1]]
        x = self.layers(x, src_key_padding_mask=ids == _PADDING)
        return F.normalize(self.project(x[:, 0]).float(), dim=-1)  # the start token has read the whole caption


class Evaluator(nn.Module):
    """Picture and caption encoder together; pictures are (B, 3, 128, 128) in [-1, 1]."""

    def __init__(self, width: int = 96, text_width: int = 64, embedding: int = 96) -> None:
        super().__init__()
        self.pictures = PictureEncoder(width, embedding)
        self.captions = CaptionEncoder(text_width, embedding)
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    def forward(self, pictures: Tensor) -> Logits:
        return self.pictures(pictures)

    @torch.no_grad()
    def classify(self, pictures: Tensor, batch: int = 100) -> list[Attributes]:
        """Name what each picture shows."""
        return [attributes for rows in pictures.split(batch) for attributes in _attributes(self(rows))]

    @torch.no_grad()
    def embed_pictures(self, pictures: Tensor, batch: int = 100) -> Tensor:
        """Embeddings (B, E) of unit length: their product with a caption's is the cosine similarity."""
        return torch.cat([self(rows).embedding for rows in pictures.split(batch)])

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (B, E) of unit length."""
        return self.captions(tokenize(texts).to(self.log_scale.device))


def tokenize(texts: Sequence[str]) -> Tensor:
    """Ids (B, L) of the known words of each text behind a start token, padded to the longest, L at most 32."""
    rows = [
        [_START, *(_WORD_IDS[word] for word in re.findall("[a-z]+", text.lower()) if word in _WORD_IDS)]
        for text in texts
    ]
    length = min(max(len(row) for row in rows), _MAX_TOKENS)
    return torch.tensor([row[:length] + [_PADDING] * (length - len(row)) for row in rows])


def save_evaluator(evaluator: Evaluator, path: Path, metadata: dict[str, str]) -> None:
    """Write the weights in float16, with a few words on how they were made."""
    weights = {name: weight.half().contiguous() for name, weight in evaluator.state_dict().items()}
    save_file(weights, path, metadata)


def load_evaluator(path: Path = EVALUATOR_PATH) -> Evaluator:
    """Read an evaluator, ready to use; it computes in float32."""
    evaluator = Evaluator()
    evaluator.load_state_dict(load_file(path))
    return evaluator.eval().requires_grad_(False)


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(*_block(channels, channels, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


def _block(channels: int, out_channels: int, side: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, out_channels, side, stride, side // 2)
    return [convolution, nn.GroupNorm(8, out_channels), nn.ReLU()]


def _fine_detail(pictures: Tensor) -> Tensor:
    """Detail (B, 1, 64, 64) lost by averaging 2 x 2 pixels: pixel art has none; without it style is slow to learn."""
    grey = pictures.mean(dim=1, keepdim=True)
    return 4 * (grey - F.interpolate(F.avg_pool2d(grey, 2), scale_factor=2)).abs()


def _attributes(logits: Logits) -> list[Attributes]:
    rows = []
    for i, log_odds in enumerate(logits.objects.tolist()):
        ranked = sorted(zip(NOUNS, log_odds, strict=True), key=lambda pair: -pair[1])
        things = {}
        for name, choices in THING_CHOICES.items():
            picked = logits.things[name][i].argmax(dim=-1).tolist()
            things[name] = {noun: choices[j] for noun, j in zip(NOUNS, picked, strict=True)}
        background, style = (
            choices[int(logits.picture[name][i].argmax())] for name, choices in PICTURE_CHOICES.items()
        )
        rows.append(Attributes(confidence=dict(ranked), **things, background=background, style=style))
    return rows
