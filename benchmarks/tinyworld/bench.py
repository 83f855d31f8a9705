"""The bench of the study: prompts of one concept, and every measure of one way to draw it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import engine
from benchmarks.tinyworld.baselines import Drawer
from benchmarks.tinyworld.captions import full_prompt
from benchmarks.tinyworld.concepts import CONCEPTS, held_out_pictures, reference_pictures
from benchmarks.tinyworld.data import HELD_OUT_SEED, pictures_at, scene_at, to_tensor
from benchmarks.tinyworld.evaluate import judge, reconstruct
from benchmarks.tinyworld.look_judge import Look, LookJudge, overlap
from benchmarks.tinyworld.scene import Scene, Thing
from engine.evaluate.bootstrap import estimate
from engine.evaluate.divergence import fisher_divergence, noise_predictor
from engine.evaluate.similarity import image_alignment, modes, pairwise_distance, text_alignment
from engine.evaluate.tinyworld import Attributes, load_evaluator
from engine.evaluate.wasserstein import distance_record, wasserstein2_squared

DRAWING: dict[str, Any] = {"sampler": "dpmpp_2m", "steps": 20, "guidance_scale": 8.0}
_DIVERSITY_SEEDS, _FISHER_PAIRS = 16, 48
_OTHER_SEED = 1000  # first of the base's other pictures, which the Wasserstein distance is from


@dataclass(frozen=True, slots=True)
class Prompt:
    """A scene that is asked for, with a place for what the concept is called."""

    kind: str
    scene: Scene
    text: str


@cache
def study_prompts(noun: str) -> tuple[Prompt, ...]:
    """Five new places, two colours, two styles, two added objects, and one picture of two things."""

    def one(kind: str, background: str, colour: str = "", style: str = "photo", extra: str = "") -> Prompt:
        scene = Scene((Thing(noun, colour, extra=extra),), background, style=style)
        return _prompt(kind, scene, noun)

    other = "boat" if noun != "boat" else "mug"
    pair = Scene((Thing(noun, "", "small", position="left"), Thing(other, "", "small", position="right")), "beach")
    places = [one("place", background) for background in ("beach", "snow", "night sky", "city", "desert")]
    colours = [one("colour", "forest", colour="red"), one("colour", "river", colour="green")]
    styles = [one("style", "river", style="sketch"), one("style", "snow", style="pixel")]
    added = [one("added", "beach", extra="ball"), one("added", "desert", extra="ball")]
    return (*places, *colours, *styles, *added, _prompt("two", pair, noun))


def _prompt(kind: str, scene: Scene, noun: str) -> Prompt:
    return Prompt(kind, scene, full_prompt(scene).replace(f" {noun}", " {}", 1))


class Bench:
    """What all records of one concept are measured against; made once per process."""

    def __init__(self, concept: str, seeds: int, looks: LookJudge) -> None:
        self.sd, self.concept, self.seeds, self.noun = engine.load(), concept, seeds, CONCEPTS[concept].noun
        self.evaluator, self.looks = load_evaluator(), looks
        self.prompts = study_prompts(self.noun)
        self.references = self.evaluator.embed_pictures(to_tensor(reference_pictures(concept)))
        self.plain = self._draw(Drawer(self.sd, self.noun, None, 0))
        self.others = self._draw(Drawer(self.sd, self.noun, None, 0), _OTHER_SEED)
        self.floor = wasserstein2_squared(self.others.latents, self.plain.latents)
        self.silhouettes = [look.silhouette for look in self.looks.see(to_tensor(self.plain.images))]
        self.pairs = {kind: self._pairs(kind) for kind in ("other", "noun")}

    def _pairs(self, kind: str) -> tuple[Tensor, list[str]]:
        """Held-out drawings as latents and their prompts: without the concept's noun, or of it alone."""
        wanted = [
            i
            for i in range(20_000)
            if (scene := scene_at(i, HELD_OUT_SEED)).style == "photo"
            and ({thing.object for thing in scene.things} == {self.noun}) == (kind == "noun")
            and (kind == "noun" or all(thing.object != self.noun for thing in scene.things))
        ][:_FISHER_PAIRS]
        drawn = torch.cat([pictures_at(range(i, i + 1), HELD_OUT_SEED) for i in wanted])
        latents = self.sd.vae.encode(drawn) * self.sd.vae.config.scaling_factor
        return latents, [full_prompt(scene_at(i, HELD_OUT_SEED)) for i in wanted]

    def _draw(self, drawer: Drawer, first_seed: int = 0) -> engine.Result:
        texts = [prompt.text.format(drawer.phrase) for prompt in self.prompts]
        return self._generate(drawer, texts, self.seeds, first_seed)

    def _generate(self, drawer: Drawer, texts: Sequence[str], count: int, first_seed: int = 0) -> engine.Result:
        return drawer.sd.generate(
            list(texts),
            images_per_prompt=count,
            seed=list(range(first_seed, first_seed + count)) * len(texts),
            customization=drawer.customization,
            progress=False,
            **DRAWING,
        )

    def recall(self) -> float:
        """How many drawings of the concept in every context, after the VAE, the judge of looks accepts: a ceiling."""
        pictures = reconstruct(self.sd.vae, to_tensor(held_out_pictures(self.concept)))
        return round(sum(look.shows(self.concept) for look in self.looks.see(pictures)) / len(pictures), 4)

    def measure(self, drawer: Drawer) -> tuple[dict[str, Any], list[Image.Image]]:
        """All measures of one way to draw, and its pictures, all seeds of a prompt in turn."""
        start = time.perf_counter()
        out = self._draw(drawer)
        seconds = (time.perf_counter() - start) / len(out.images)
        groups = [i for i in range(len(self.prompts)) for _ in range(self.seeds)]
        pictures = to_tensor(out.images)
        looks, asked = self.looks.see(pictures), [self.prompts[i] for i in groups]
        embedded = self.evaluator.embed_pictures(pictures)
        plain = self.evaluator.embed_texts([prompt.text.format(self.noun) for prompt in self.prompts])
        values = verdicts(self.concept, looks, self.evaluator.classify(pictures), asked) | {
            "clip_t": text_alignment(embedded, plain[groups]).tolist(),
            "clip_i": image_alignment(embedded, self.references).tolist(),
            "layout": [overlap(a.silhouette, b) for a, b in zip(looks, self.silhouettes, strict=True)],
        }
        both = [a * b * c for a, b, c in zip(values["concept"], values["object"], values["context"], strict=True)]
        measured = {name: estimate(one, groups).record() for name, one in (values | {"all": both}).items()}
        by_kind = {
            kind: {
                name: round(sum(v for v, p in zip(values[name], asked, strict=True) if p.kind == kind) / n, 4)
                for name in ("concept", "likeness", "object", "context")
            }
            for kind in dict.fromkeys(prompt.kind for prompt in asked)
            if (n := sum(p.kind == kind for p in asked))
        }
        record = measured | {
            "by_kind": by_kind,
            "diversity": self._diversity(drawer),
            "fisher": self._fisher(drawer),
            "wasserstein": distance_record(
                wasserstein2_squared(self.others.latents, out.latents), self.floor, len(out.latents)
            ),
            "bytes": drawer.n_bytes,
            "seconds_per_picture": round(seconds, 3),
        }
        return record, out.images

    def _diversity(self, drawer: Drawer) -> dict[str, Any]:
        """Of pictures whose prompt leaves place, position and facing open."""
        out = self._generate(drawer, [f"a photo of a {drawer.phrase}"], _DIVERSITY_SEEDS)
        pictures = to_tensor(out.images)
        seen = self.evaluator.classify(pictures)
        found = {"pairwise": pairwise_distance(self.evaluator.embed_pictures(pictures), [0] * len(pictures))[0]}
        labels = {
            "backgrounds": [one.background for one in seen],
            "positions": [one.position[self.noun] for one in seen],
            "facings": [one.facing[self.noun] for one in seen],
        }
        for name, values in labels.items():
            found[name] = modes(values)[1]
        return {name: round(value, 4) for name, value in found.items()} | {"n": len(pictures)}

    def _fisher(self, drawer: Drawer) -> dict[str, Any]:
        found = {}
        base = noise_predictor(self.sd)
        for kind, (latents, prompts) in self.pairs.items():
            acting = drawer.everywhere
            if kind == "other" and isinstance(acting, engine.Infusion):
                acting = None  # its residuals act at their own noun alone
            custom = noise_predictor(drawer.sd, acting)
            found[kind] = fisher_divergence(self.sd, base, custom, latents, prompts).record()
        return found


def verdicts(
    concept: str, looks: Sequence[Look], seen: Sequence[Attributes], asked: Sequence[Prompt]
) -> dict[str, list[float]]:
    """Of each picture, whether it shows the concept's look, how much of it, the noun, and what else was asked for."""
    return {
        "concept": [float(look.shows(concept)) for look in looks],
        "likeness": [look.likeness(concept) for look in looks],
        "object": [float(look.noun == CONCEPTS[concept].noun) for look in looks],
        "context": [float(_has_context(one, prompt)) for one, prompt in zip(seen, asked, strict=True)],
    }


def _has_context(seen: Attributes, prompt: Prompt) -> bool:
    """Whether the picture has all that its prompt says beside the concept."""
    scene = prompt.scene
    right = judge(seen, scene)
    wanted = [right["background"], right["style"]]
    if scene.things[0].colour:
        wanted.append(seen.colour[scene.things[0].object] == scene.things[0].colour)
    wanted += [thing.object in seen.objects for thing in scene.things[1:]]
    return all(wanted)
