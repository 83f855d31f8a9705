"""What studies of custom concepts share: their prompts, sets of settings, how shares are told, running side by side."""

import inspect
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import engine
from benchmarks.machine import machine, write_result
from benchmarks.tinyworld.backgrounds import BACKGROUNDS
from benchmarks.tinyworld.captions import full_prompt
from benchmarks.tinyworld.concept_judge import ConceptJudge
from benchmarks.tinyworld.concepts import CONCEPTS, held_out_pictures
from benchmarks.tinyworld.data import to_tensor
from benchmarks.tinyworld.evaluate import interval, reconstruct
from benchmarks.tinyworld.object_judge import ObjectJudge, other_objects
from benchmarks.tinyworld.scene import Scene, Thing
from engine.evaluate.tinyworld import load_evaluator

Settings = dict[str, dict[str, Any]]  # of training, drawing and so on, by name


def defaults_of(function: Callable[..., Any], *names: str) -> dict[str, Any]:
    """The library's own values of some keywords."""
    parameters = inspect.signature(function).parameters
    return {name: parameters[name].default for name in names}


DRAWING = defaults_of(engine.Engine.generate, "sampler", "steps", "guidance_scale")


def with_changes(defaults: Settings, changes: Settings) -> Settings:
    """A set of settings that differs from the library's in some."""
    return {section: values | changes.get(section, {}) for section, values in defaults.items()}


def prompts(phrase: str) -> list[str]:
    """One prompt per background; ``phrase`` names the object, the colour is left to the model."""
    scenes = (Scene((Thing(phrase, ""),), background, "blue") for background in BACKGROUNDS)
    return [full_prompt(scene) for scene in scenes]


class Judge:
    """Draws a concept in every context, ``seeds`` pictures each, and says what is seen."""

    def __init__(self, sd: engine.Engine, name: str, seeds: int, objects: ObjectJudge, drawing: dict[str, Any]) -> None:
        self.sd, self.name, self.seeds, self.objects, self.drawing = sd, name, seeds, objects, drawing
        self.evaluator = load_evaluator()
        self.noun = CONCEPTS[name].noun
        self.concept_seen = ConceptJudge(name, self.evaluator)

    def draw(self, phrase: str, customization: Any) -> engine.Result:
        """The pictures of ``prompts(phrase)``, all seeds of one in turn."""
        texts = prompts(phrase)
        return self.sd.generate(
            texts,
            images_per_prompt=self.seeds,
            seed=list(range(self.seeds)) * len(texts),
            customization=customization,
            progress=False,
            **self.drawing,
        )

    def __call__(self, images: list[Image.Image]) -> dict[str, Any]:
        """How many of such pictures show the concept, the background asked for and the noun, with 95 % intervals."""
        pictures = to_tensor(images)
        seen = self.evaluator.classify(pictures)
        wanted = [background for background in BACKGROUNDS for _ in range(self.seeds)]
        verdicts = {
            "concept": self.concept_seen(pictures),
            "background": [one.background == background for one, background in zip(seen, wanted, strict=True)],
            "object": [noun == self.noun for noun in self.objects(pictures)],
        }
        return {
            what: {"share": sum(right) / len(right), "interval": interval(right), "n": len(right)}
            for what, right in verdicts.items()
        }

    def accuracies(self) -> dict[str, Any]:
        """How often the judges are right on held-out drawings: of the concept, plain, and of others in its look."""
        drawn = to_tensor(held_out_pictures(self.name))
        nouns, others = [self.noun] * len(drawn), other_objects(self.name)
        kinds = {"concept": drawn, "concept_through_vae": reconstruct(self.sd.vae, drawn)}
        object_judge = {kind: self.objects.share_right(pictures, nouns) for kind, pictures in kinds.items()}
        object_judge |= {"plain": self.objects.accuracy, "others_in_its_look": self.objects.share_right(*others)}
        seen = {kind: self.evaluator.classify(pictures) for kind, pictures in kinds.items()}
        evaluator = {
            kind: sum(next(iter(one.confidence)) == self.noun for one in found) / len(found)
            for kind, found in seen.items()
        }
        return {
            "judge_accuracy": self.concept_seen.accuracy,
            "object_judge_accuracy": object_judge,
            "evaluator_accuracy_on_concept": evaluator,
        }


def processes(jobs: int, n_threads: int = 1) -> ProcessPoolExecutor:
    """``jobs`` processes, whose torch has so many threads each."""
    context = multiprocessing.get_context("spawn")  # a fork would copy locks of running threads
    return ProcessPoolExecutor(jobs, context, torch.set_num_threads, (n_threads,))


def side_by_side(
    study: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], jobs: int, n_threads: int | None = None
) -> Iterator[Any]:
    """``study(*task)`` for every task, ``jobs`` processes at a time, as small models leave threads idle.

    Each has ``n_threads``, or its share of this process' threads. Results come in order, each as soon as it is there.
    """
    with processes(jobs, n_threads or max(1, torch.get_num_threads() // jobs)) as pool:
        yield from pool.map(study, *zip(*tasks, strict=True))


def write_set(path: Path, kind: str, name: str, settings: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Write the records of one set of settings; those of other sets stay in the file as they are."""
    found = json.loads(path.read_text()) if path.exists() else {"settings": {}, kind: []}
    about = machine()
    found["settings"][name] = settings | {"commit": about["commit"], "date": about["date"]}
    others = [record for record in found[kind] if record["settings"] != name]
    content = {"settings": found["settings"], kind: [*others, *({"settings": name} | record for record in records)]}
    write_result(path, about, content)
