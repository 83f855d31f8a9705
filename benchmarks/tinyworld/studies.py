"""What studies of custom concepts share: their prompts, how shares are told, and running side by side."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from PIL import Image

import engine
from benchmarks.tinyworld.backgrounds import BACKGROUNDS
from benchmarks.tinyworld.captions import full_prompt
from benchmarks.tinyworld.concept_judge import ConceptJudge
from benchmarks.tinyworld.concepts import CONCEPTS
from benchmarks.tinyworld.data import to_tensor
from benchmarks.tinyworld.evaluate import interval
from benchmarks.tinyworld.evaluator import load_evaluator
from benchmarks.tinyworld.scene import Scene, Thing

STEPS, GUIDANCE_SCALE = 50, 4.0


def prompts(phrase: str) -> list[str]:
    """One prompt per background; ``phrase`` names the object, the colour is left to the model."""
    scenes = (Scene((Thing(phrase, ""),), background, "blue") for background in BACKGROUNDS)
    return [full_prompt(scene) for scene in scenes]


class Judge:
    """Draws a concept in every context, ``seeds`` pictures each, and says what is seen."""

    def __init__(self, sd: engine.Engine, name: str, seeds: int) -> None:
        self.sd, self.seeds, self.evaluator = sd, seeds, load_evaluator()
        self.noun = CONCEPTS[name].noun
        self.concept_seen = ConceptJudge(name, self.evaluator)

    def draw(self, phrase: str, customization: Any) -> engine.Result:
        """The pictures of ``prompts(phrase)``, all seeds of one in turn."""
        texts = prompts(phrase)
        return self.sd.generate(
            texts,
            images_per_prompt=self.seeds,
            seed=list(range(self.seeds)) * len(texts),
            steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
            customization=customization,
            progress=False,
        )

    def __call__(self, images: list[Image.Image]) -> dict[str, Any]:
        """How many of such pictures show the concept, the background asked for and the noun, with 95 % intervals."""
        pictures = to_tensor(images)
        seen = self.evaluator.classify(pictures)
        wanted = [background for background in BACKGROUNDS for _ in range(self.seeds)]
        verdicts = {
            "concept": self.concept_seen(pictures),
            "background": [one.background == background for one, background in zip(seen, wanted, strict=True)],
            "object": [next(iter(one.confidence)) == self.noun for one in seen],
        }
        return {
            what: {"share": sum(right) / len(right), "interval": interval(right), "n": len(right)}
            for what, right in verdicts.items()
        }


def side_by_side(study: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], jobs: int) -> list[Any]:
    """``study(*task)`` for every task, ``jobs`` processes at a time, as small models leave threads idle.

    Each has its share of the threads. Results are in order.
    """
    n_threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")  # a fork would copy locks of running threads
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (n_threads,)) as pool:
        return list(pool.map(study, *zip(*tasks, strict=True)))
