"""Cross-attention maps of words: where in the picture each word acts, per layer and step, and as heat maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..checks import check_choice, check_integer, check_number
from ..models.conditioning import Observe

Watched = tuple[int, list[list[int]]]

_WEAK, _STRONG = (20, 30, 140), (255, 60, 0)  # colours of a heat map's ends


@dataclass(frozen=True, slots=True)
class AttentionMaps:
    """Maps of the conditional rows, from which both foundation and customised picture are drawn.

    Attributes:
        words: as asked for.
        layers: by cross-attention layer, in forward order: (I, T, W, H, h, w) float16, for image, step, word, head and
            position: the share of the position's attention that goes to the word's tokens.
    """

    words: tuple[str, ...]
    layers: Mapping[str, np.ndarray]

    def heat_map(
        self, word: str, image: int = 0, layers: Sequence[str] | None = None, steps: slice = slice(None)
    ) -> np.ndarray:
        """Mean over layers, steps and heads at the finest layer's size, scaled to 0..1; (h, w) float32.

        Args:
            word: one of ``words``.
            image: which image.
            layers: names of layers; all where not given.
            steps: which steps.
        """
        check_choice("word", word, self.words)
        names = list(self.layers) if layers is None else [check_choice("layer", n, tuple(self.layers)) for n in layers]
        check_integer("image", image, 0, len(self.layers[names[0]]) - 1)
        chosen = [self.layers[name][image, steps, self.words.index(word)].astype(np.float32) for name in names]
        if not chosen[0].size:
            raise ValueError(f"steps must choose at least one of the steps, got {steps}")
        size = max(maps.shape[-2:] for maps in chosen)
        means = [torch.from_numpy(maps.mean(axis=(0, 1)))[None, None] for maps in chosen]
        return scaled(torch.cat([F.interpolate(mean, size=size, mode="bilinear") for mean in means]).mean(dim=0)[0])

    def overlay(self, picture: Image.Image, word: str, image: int = 0, opacity: float = 0.6, **choice) -> Image.Image:
        """The heat map over a picture, blue to red.

        Args:
            picture: usually ``out.images[image]``.
            word, image, choice: see ``heat_map``.
            opacity: of the heat map where it is strongest, 0 to 1.
        """
        return heat_overlay(picture, self.heat_map(word, image, **choice), opacity)


class Recorder:
    """Collects map columns during a denoising loop.

    Args:
        words: what is recorded.
        n_heads: of each cross-attention layer, by name, in forward order.
        size: height and width of the latents.
    """

    def __init__(self, words: Sequence[str], n_heads: Mapping[str, int], size: tuple[int, int]) -> None:
        self.words, self.size = tuple(words), size
        self.layers = list(n_heads.items())
        self.maps: dict[str, list[np.ndarray]] = {name: [] for name in n_heads}
        self._step: dict[str, np.ndarray] = {}  # of the step that runs, by layer

    def watching(self, watched: Sequence[Watched]) -> Observe:
        """What takes the columns of rows laid out by one plan: each image's owner, and each word's slots."""
        return lambda layer, _out, columns: self._take(watched, layer, columns)

    def _take(self, watched: Sequence[Watched], layer: int, columns: Tensor) -> None:
        """Keep one layer's columns (B, N, T*H) of one step."""
        name, n_heads = self.layers[layer]
        by_slot = columns.unflatten(-1, (-1, n_heads)).permute(0, 2, 3, 1)  # (B, T, H, N)
        images = [torch.stack([by_slot[row, slots].sum(dim=0) for slots in words]) for row, words in watched]
        maps = torch.stack(images).unflatten(-1, layer_size(self.size, columns.shape[1]))
        self._step[name] = maps.to("cpu", torch.float16).numpy()

    def forget_step(self) -> None:
        """An attempt at a step begins."""
        self._step = {}

    def keep_step(self) -> None:
        """The step is done."""
        for name, maps in self._step.items():
            self.maps[name].append(maps)

    def result(self) -> AttentionMaps:
        return AttentionMaps(self.words, {name: np.stack(maps, axis=1) for name, maps in self.maps.items()})


def layer_size(size: tuple[int, int], n_positions: int) -> tuple[int, int]:
    """Height and width of a layer with so many positions, for latents of ``size``."""
    height, width = size
    while height * width > n_positions:
        height, width = -(-height // 2), -(-width // 2)
    return height, width


def scaled(heat: Tensor) -> np.ndarray:
    """The same heat (h, w), from 0 to 1, float32."""
    heat = heat.float()
    return ((heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)).numpy()


def heat_overlay(picture: Image.Image, heat: np.ndarray, opacity: float) -> Image.Image:
    """Heat (h, w) in 0..1 over a picture, blue to red; ``opacity`` is that of the strongest, 0 to 1."""
    opacity = check_number("opacity", opacity, 0.0, 1.0)
    small = Image.fromarray((heat * 255).round().astype(np.uint8))
    share = np.asarray(small.resize(picture.size, Image.Resampling.BICUBIC), np.float32)[..., None] / 255
    colour = (1 - share) * np.array(_WEAK, np.float32) + share * np.array(_STRONG, np.float32)
    alpha = opacity * (0.35 + 0.65 * share)
    mixed = (1 - alpha) * np.asarray(picture.convert("RGB"), np.float32) + alpha * colour
    return Image.fromarray(mixed.round().astype(np.uint8))
