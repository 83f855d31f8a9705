"""The study's prompts for one concept, the base's pictures of them, and what is seen of a customised model's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import engine
from benchmarks.tinyworld.bench import DRAWING, study_prompts, verdicts
from benchmarks.tinyworld.concepts import CONCEPTS
from benchmarks.tinyworld.data import to_tensor
from benchmarks.tinyworld.look_judge import look_judge, overlap
from engine.evaluate.bootstrap import estimate
from engine.evaluate.tinyworld import load_evaluator


class Prompted:
    """Twelve prompts of one concept and some seeds, a prompt's seeds in turn.

    Attributes:
        asked: the prompt of each picture.
        numbers: its seed.
    """

    def __init__(self, concept: str, seeds: int, judges: Path) -> None:
        self.sd, self.concept, self.seeds, self.noun = engine.load(), concept, seeds, CONCEPTS[concept].noun
        self.looks, self.evaluator = look_judge(judges), load_evaluator()
        self.asked = [prompt for prompt in study_prompts(self.noun) for _ in range(seeds)]
        self.numbers = [i % seeds for i in range(len(self.asked))]

    @cached_property
    def silhouettes(self) -> Tensor:
        """(I, 16, 16) in [0, 1], of the objects in the base's pictures of the plain noun."""
        return self.covers(self.base_images())

    def base_images(self) -> list[Image.Image]:
        """The base's pictures of the plain noun."""
        return self.draw(self.noun, [None]).images

    def texts(self, phrase: str) -> list[str]:
        """The prompts, in which ``phrase`` stands for the concept."""
        return [prompt.text.format(phrase) for prompt in self.asked]

    def draw(self, phrase: str, customizations: Sequence[Any], first_seed: int = 0, **changes: Any) -> engine.Result:
        """All pictures under each customisation in turn; ``changes`` of how the study draws."""
        n, numbers = len(customizations), [first_seed + number for number in self.numbers]
        return self.sd.generate(
            n * self.texts(phrase),
            seed=n * numbers,
            customization=[custom for custom in customizations for _ in numbers],
            progress=False,
            **DRAWING | changes,
        )

    def covers(self, images: Sequence[Image.Image]) -> Tensor:
        """Silhouettes (I, 16, 16) in [0, 1] of the pictures' objects."""
        return self.seen_covers(to_tensor(list(images)))

    def seen_covers(self, pictures: Tensor) -> Tensor:
        """The same of pictures (I, 3, 128, 128) in [-1, 1]."""
        return torch.stack([look.silhouette for look in self.looks.see(pictures)])

    def values(self, images: Sequence[Image.Image], silhouettes: Tensor | None = None) -> dict[str, list[float]]:
        """Of each picture what the study tells, and its overlap with the base's silhouette, or a given one."""
        pictures = to_tensor(list(images))
        looks, seen = self.looks.see(pictures), self.evaluator.classify(pictures)
        bases = self.silhouettes if silhouettes is None else silhouettes
        overlaps = [overlap(look.silhouette, base) for look, base in zip(looks, bases, strict=True)]
        return verdicts(self.concept, looks, seen, self.asked) | {"layout": overlaps}

    def estimate(self, values: Sequence[float]) -> dict[str, Any]:
        """Mean and 95 % interval over prompts, as a record."""
        return estimate(values, [i // self.seeds for i in range(len(values))]).record()

    def estimates(self, images: Sequence[Image.Image], silhouettes: Tensor | None = None) -> dict[str, Any]:
        """``values``, each as a record."""
        return {name: self.estimate(one) for name, one in self.values(images, silhouettes).items()}
