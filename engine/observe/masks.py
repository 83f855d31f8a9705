"""The masks by which DCI's two branches mix: recorded on request, as arrays and as a figure (ECCV 2024, fig. 11)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..models.conditioning import ObserveMasks
from .sheet import grid
from .word_maps import heat_overlay, layer_size, scaled


@dataclass(frozen=True, slots=True)
class BranchMasks:
    """One image's auxiliary mask: the softmax over space of what its prompt's tokens, but the noun, attend to.

    Attributes:
        layers: by cross-attention layer, in forward order: (T, H, h, w) float32, for mixing step, head and position;
            each mask sums to 1.
    """

    layers: Mapping[str, np.ndarray]

    def heat_map(self, size: tuple[int, int], steps: slice = slice(None)) -> np.ndarray:
        """Mean over steps, heads and the layers of one size (h, w), scaled to 0..1; float32."""
        chosen = [maps[steps] for maps in self.layers.values() if maps.shape[-2:] == tuple(size)]
        if not chosen or not chosen[0].size:
            raise ValueError(
                f"size must be a layer's, one of {self.sizes}, and steps some that mix; got {size}, {steps}"
            )
        return scaled(torch.from_numpy(np.mean([maps.mean(axis=(0, 1)) for maps in chosen], axis=0)))

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The layers' sizes, the finest first."""
        return sorted({maps.shape[-2:] for maps in self.layers.values()}, reverse=True)

    def figure(self, picture: Image.Image, opacity: float = 0.7) -> Image.Image:
        """The picture, and the mask over it at every scale, the finest first."""
        panels = [picture.convert("RGB")]
        panels += [heat_overlay(picture, self.heat_map(size), opacity) for size in self.sizes]
        return grid(panels, columns=len(panels))


class MaskRecorder:
    """Collects masks during a denoising loop.

    Args:
        layers: names of the cross-attention layers in forward order.
        size: height and width of the latents.
    """

    def __init__(self, layers: Sequence[str], size: tuple[int, int]) -> None:
        self.layers, self.size = list(layers), size
        self.maps: dict[int, dict[str, list[np.ndarray]]] = {}
        self._step: list[tuple[int, str, np.ndarray]] = []  # image, layer and mask of the step that runs

    def watching(self, images: Sequence[int]) -> ObserveMasks:
        """What takes the masks (2M, H, N) of one plan's pairs, by the image of each pair."""

        def take(layer: int, masks: Tensor) -> None:
            auxiliary = masks[len(images) :].unflatten(-1, layer_size(self.size, masks.shape[-1])).cpu().numpy()
            for image, mask in zip(images, auxiliary, strict=True):
                self._step.append((image, self.layers[layer], mask))

        return take

    def forget_step(self) -> None:
        """An attempt at a step begins."""
        self._step = []

    def keep_step(self) -> None:
        """The step is done."""
        for image, layer, mask in self._step:
            self.maps.setdefault(image, {}).setdefault(layer, []).append(mask)

    def result(self, n_images: int) -> list[BranchMasks | None]:
        """The masks of each image, None for those that did not mix."""
        return [
            BranchMasks({name: np.stack(maps) for name, maps in self.maps[i].items()}) if i in self.maps else None
            for i in range(n_images)
        ]
