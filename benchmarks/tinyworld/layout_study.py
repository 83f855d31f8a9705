"""Why Infusion keeps its foundation's layout in part: ``python -m benchmarks.tinyworld.layout_study``.

Pictures of the study's prompts, drawn under interventions that each take one suspected cause away, and from concepts
that are trained in other ways. Layout is the overlap of the object's silhouette with the foundation's; beside it stand
what it would be by chance, and what the judge of silhouettes finds between two drawings of one scene. Trainings run
side by side, one thread each; what is done lies in ``--out``. Writes ``benchmarks/results/layout-<date>.json``.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from benchmarks.machine import RESULTS, machine, write_result
from benchmarks.tinyworld.bench import DRAWING, study_prompts
from benchmarks.tinyworld.concepts import CONCEPTS
from benchmarks.tinyworld.data import to_tensor
from benchmarks.tinyworld.evaluate import reconstruct
from benchmarks.tinyworld.interventions import Foundations, Intervention, mass_on
from benchmarks.tinyworld.layout_training import BATCH_SIZE, RATE, STEPS, TRAININGS, train
from benchmarks.tinyworld.look_judge import look_judge, overlap
from benchmarks.tinyworld.palette import COLOURS
from benchmarks.tinyworld.prompted import Prompted
from benchmarks.tinyworld.scene import FACINGS, POSITIONS, SIZES, Scene, Thing, draw
from benchmarks.tinyworld.studies import side_by_side
from engine.evaluate.bootstrap import estimate
from engine.observe.sheet import grid

METHOD, BOUNDS = "the method", "bounds"
INTERVENTIONS = {
    METHOD: Intervention(),
    "strength 0.5": Intervention(strength=0.5),
    "strength 0.75": Intervention(strength=0.75),
    "layers of 16": Intervention(sides=(16,)),
    "layers of 8": Intervention(sides=(8,)),
    "layers of 4 and 2": Intervention(sides=(4, 2)),
    "layers of 16 and 8": Intervention(sides=(16, 8)),
    "from 10 % of the steps": Intervention(first=0.1),
    "from 20 % of the steps": Intervention(first=0.2),
    "from 40 % of the steps": Intervention(first=0.4),
    "until 40 % of the steps": Intervention(last=0.4),
    "map cut to the object": Intervention(cut=True),
    "map cut, from 20 % of the steps": Intervention(cut=True, first=0.2),
    "map squared": Intervention(power=2.0),
    "map to the 4th power": Intervention(power=4.0),
    "map squared, from 20 % of the steps": Intervention(power=2.0, first=0.2),
    "self-attention's maps, 20 %": Intervention(self_maps=0.2),
    "self-attention's maps, 50 %": Intervention(self_maps=0.5),
    "self-attention's maps, 100 %": Intervention(self_maps=1.0),
    "self-attention's maps, 100 %, and map cut": Intervention(self_maps=1.0, cut=True),
}
_OTHER_SEED = 1000


class LayoutBench(Prompted):
    """Foundations of one concept's prompts, and what becomes of their objects' silhouettes."""

    @cached_property
    def foundations(self) -> Foundations:
        return Foundations(self.sd, self.noun, self.texts(self.noun), self.numbers, DRAWING)

    def base_images(self) -> list[Image.Image]:
        return self.foundations.images

    def measure(self, images: list[Image.Image]) -> dict[str, Any]:
        """What the study measures, and layout by the size of the foundation's object."""
        return self.estimates(images) | self._by_size(self.covers(images))

    def bounds(self) -> dict[str, Any]:
        """Layout of the base's pictures of other seeds, and of drawings of one scene with and without the look."""
        others = self.draw(self.noun, [None], _OTHER_SEED).images
        chance = {"layout": self.estimates(others)["layout"], **self._by_size(self.covers(others))}
        return {"chance": chance, "judge": self._same_scene()}

    def map_mass(self) -> dict[str, Any]:
        """By a layer's side: the share of the noun's map on the foundation's object, and that of the picture."""
        found = {}
        for side, (share, area) in mass_on(self.foundations, self.silhouettes).items():
            found[str(side)] = {
                half: {"mass": round(float(share[rows].mean()), 4), "area": round(float(area[rows].mean()), 4)}
                for half, rows in self._halves().items()
            }
        return found

    def _by_size(self, covers: Tensor) -> dict[str, Any]:
        overlaps = [overlap(one, base) for one, base in zip(covers, self.silhouettes, strict=True)]
        growth = (covers.flatten(1).mean(dim=1) / self.silhouettes.flatten(1).mean(dim=1)).log()
        return {
            half: {
                "layout": round(float(np.mean([overlaps[i] for i in rows])), 4),
                "growth": round(float(growth[rows].mean().exp()), 4),
            }
            for half, rows in self._halves().items()
        }

    def _halves(self) -> dict[str, list[int]]:
        """The pictures whose foundation's object is smaller than the median, and the others."""
        order = self.silhouettes.flatten(1).mean(dim=1).argsort().tolist()
        return {"small": order[: len(order) // 2], "large": order[len(order) // 2 :]}

    def _same_scene(self) -> dict[str, Any]:
        """What the judge finds between a plain object and the concept, drawn in one pose and place, after the VAE."""
        one, rng = CONCEPTS[self.concept], random.Random(0)
        drawn: tuple[list[Image.Image], list[Image.Image]] = ([], [])
        for background in [prompt.scene.background for prompt in self.asked if prompt.kind == "place"]:
            where = {"size": rng.choice(SIZES), "position": rng.choice(POSITIONS), "facing": rng.choice(FACINGS)}
            plain = Thing(self.noun, rng.choice(list(COLOURS)), **where, seed=rng.getrandbits(32))
            custom = replace(plain, colour=one.colour, pattern=one.pattern, pattern_colour=one.pattern_colour)
            for images, thing in zip(drawn, (plain, custom), strict=True):
                images.append(draw(Scene((thing,), background, seed=plain.seed)))
        covers = [self.seen_covers(reconstruct(self.sd.vae, to_tensor(images))) for images in drawn]
        return {"layout": estimate([overlap(a, b) for a, b in zip(*covers, strict=True)]).record()}


@cache
def _bench(concept: str, seeds: int, judges: Path) -> LayoutBench:
    return LayoutBench(concept, seeds, judges)


@dataclass(frozen=True, slots=True)
class Task:
    """One training of one concept, drawn under some interventions; or, of no training, what layouts stand beside."""

    concept: str
    training: str
    interventions: tuple[str, ...]
    seeds: int

    @property
    def name(self) -> str:
        return f"{self.concept}-{self.training}-{self.seeds}".replace(" ", "_").replace("%", "").replace(",", "")


def run(task: Task, out: Path, judges: Path) -> list[dict[str, Any]]:
    """Its records, from ``out`` where they are there."""
    path = out / "records" / f"{task.name}.json"
    records: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    done = {record["drawing"] for record in records}
    left = [name for name in task.interventions if name not in done]
    if not left:
        return records
    bench = _bench(task.concept, task.seeds, judges)
    about = {"concept_name": task.concept, "training": task.training}
    path.parent.mkdir(parents=True, exist_ok=True)
    if task.training == BOUNDS:
        records = [about | {"drawing": BOUNDS, **bench.bounds(), "map_mass": bench.map_mass()}]
        path.write_text(json.dumps(records))
        return records
    parts = train(bench.sd, task.concept, TRAININGS[task.training], out / "trained" / f"{task.name}.pt")
    for name in left:
        images = bench.foundations.draw(parts, INTERVENTIONS[name], bench.silhouettes)
        records.append(about | {"drawing": name, **bench.measure(images)})
        sheet = out / "sheets" / f"{task.name}-{name}.png".replace(" ", "_")
        sheet.parent.mkdir(parents=True, exist_ok=True)
        pairs = [*bench.foundations.images[:: task.seeds], *images[:: task.seeds]]
        grid(pairs, columns=len(pairs) // 2).save(sheet)
        path.write_text(json.dumps(records))
        _tell(records[-1])
    return records


def _tell(record: dict[str, Any]) -> None:
    shares = {name: record[name]["mean"] for name in ("layout", "likeness", "object", "context")}
    print(record["concept_name"], record["training"], "/", record["drawing"], shares, record["small"], flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", nargs="+", default=["striped-cat", "checkered-teapot"], choices=list(CONCEPTS))
    parser.add_argument("--trainings", nargs="+", default=list(TRAININGS), choices=list(TRAININGS))
    parser.add_argument("--seeds", type=int, default=4, help="pictures per prompt")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("out/layout"), help="folder for what is done, and sheets")
    parser.add_argument("--judges", type=Path, default=Path("out/study"), help="folder of the judge of looks")
    parser.add_argument("--result", type=Path, default=RESULTS / f"layout-{date.today().isoformat()}.json")
    arguments = parser.parse_args(argv)
    judge = look_judge(arguments.judges)
    tasks = [Task(concept, BOUNDS, (BOUNDS,), arguments.seeds) for concept in arguments.concepts]
    for training in arguments.trainings:
        drawn = tuple(INTERVENTIONS) if training == METHOD else (METHOD,)
        tasks += [Task(concept, training, drawn, arguments.seeds) for concept in arguments.concepts]
    calls = [(task, arguments.out, arguments.judges) for task in tasks]
    records = [record for found in side_by_side(run, calls, arguments.jobs, n_threads=1) for record in found]
    settings = {
        "drawing": DRAWING,
        "training": {"steps": STEPS, "learning_rate": RATE, "batch_size": BATCH_SIZE, "space": "text"},
        "seeds": arguments.seeds,
        "prompts": [prompt.text for prompt in study_prompts("cat")],
        "judge_accuracy": judge.accuracy,
    }
    write_result(arguments.result, machine(), {"settings": settings, "layout": records})


if __name__ == "__main__":
    main()
