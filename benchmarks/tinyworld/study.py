"""Both papers' measures over both methods and their rivals: ``python -m benchmarks.tinyworld.study``.

Budgets are equal. For every method and concept, at several checkpoints of a training: pictures of twelve prompts, which
are judged for the concept and for what else the prompt says; their distance to the foundation's pictures of the same
prompts and seeds; diversity where the prompt leaves it open; and the divergences of the model from the base. Trainings
run side by side, one thread each, and go on where they were stopped: what is done lies in ``--out``.
Writes ``benchmarks/results/study-<date>.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.machine import RESULTS, machine, write_result
from benchmarks.tinyworld.baselines import (
    ICO,
    CustomDiffusion,
    Drawer,
    DreamBooth,
    Infusion,
    LoRA,
    Perfusion,
    TextualInversion,
)
from benchmarks.tinyworld.bench import DRAWING, Bench, study_prompts
from benchmarks.tinyworld.concepts import CONCEPTS, reference_pictures
from benchmarks.tinyworld.look_judge import look_judge
from benchmarks.tinyworld.small_judge import small_judge
from benchmarks.tinyworld.studies import processes
from engine.observe.sheet import grid
from engine.train import loop
from engine.train.ico import ICOOptions
from engine.train.infusion import InfusionOptions
from engine.train.options import TrainOptions

CHECKPOINTS = (100, 250, 500, 1000)
TUNED_ON = "rainbow-backpack"
STUDIED = ("striped-cat", "checkered-teapot", "star-car")
_PRIOR_PICTURES = 64
BATCH_SIZE = 4


@dataclass(frozen=True, slots=True)
class Method:
    """One way to learn a concept.

    Attributes:
        name: of its records.
        make: the objective of ``(sd, pictures, noun, options, prior)``.
        options: the trainer's, beyond what the study sets.
        rates: learning rates to choose from, the paper's own first; or the key of the method whose choice it takes.
        prior: whether class pictures are trained on too.
    """

    name: str
    make: Callable[..., Any]
    options: type[TrainOptions]
    rates: tuple[float, ...] | str
    extra: dict[str, Any]
    prior: bool = False


def _library(kind: Callable[..., Any]) -> Callable[..., Any]:
    return lambda sd, pictures, noun, options, _prior: kind(sd, pictures, noun, options)


METHODS = {
    f"{one.name}{':' + variant if variant else ''}": one
    for one, variant in (
        (Method("infusion", _library(Infusion), InfusionOptions, (0.01, 0.003, 0.03), {"space": "text"}), "text"),
        (Method("infusion", _library(Infusion), InfusionOptions, "infusion:text", {"space": "value"}), "value"),
        (Method("ico", _library(ICO), ICOOptions, (6e-5, 4e-4, 1.5e-3), {"scheme": "ico"}), ""),
        (Method("dci", _library(ICO), ICOOptions, "ico", {"scheme": "dci"}), ""),
        (Method("textual_inversion", TextualInversion, TrainOptions, (5e-3, 2e-2, 1e-3), {}), ""),
        (Method("dreambooth", DreamBooth, TrainOptions, (5e-6, 5e-5, 2e-4), {}), ""),
        (Method("dreambooth", DreamBooth, TrainOptions, "dreambooth", {}, True), "prior"),
        (Method("lora", LoRA, TrainOptions, (1e-4, 1e-3, 4e-3), {}), ""),
        (Method("custom_diffusion", CustomDiffusion, TrainOptions, (1e-5, 1e-4, 5e-4), {}, True), ""),
        (Method("perfusion", Perfusion, TrainOptions, (0.03, 0.01, 0.1), {}), ""),
    )
}


JUDGES = {"whole": look_judge, "small": small_judge}


@cache
def _bench(concept: str, seeds: int, judge: str, folder: Path) -> Bench:
    return Bench(concept, seeds, JUDGES[judge](folder))


@dataclass(frozen=True, slots=True)
class Task:
    """One training, measured at its checkpoints.

    Attributes:
        method: a key of ``METHODS``, or "base" for the model as it is.
        judge: a key of ``JUDGES``.
    """

    method: str
    concept: str
    rate: float
    checkpoints: tuple[int, ...]
    seeds: int
    judge: str

    @property
    def name(self) -> str:
        own = f"{self.concept}-{self.method.replace(':', '-')}-{self.rate:g}-{max(self.checkpoints)}-{self.seeds}"
        return own + ("" if self.judge == "whole" else f"-{self.judge}")


def run(task: Task, folder: Path) -> list[dict[str, Any]]:
    """Train and measure; from ``folder`` where that has been done."""
    path = folder / "records" / f"{task.name}.json"
    if path.exists():
        return json.loads(path.read_text())
    bench = _bench(task.concept, task.seeds, task.judge, folder)
    records = _base(bench) if task.method == "base" else _train(task, bench, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))
    return records


def _base(bench: Bench) -> list[dict[str, Any]]:
    measured, _ = bench.measure(Drawer(bench.sd, bench.noun, None, 0))
    about = {"method": "base", "trained_as": "base", "variant": "", "concept_name": bench.concept, "steps": 0}
    return [about | {"judge_recall": bench.recall()} | measured]


def _train(task: Task, bench: Bench, folder: Path) -> list[dict[str, Any]]:
    method, variant = METHODS[task.method], task.method.partition(":")[2]
    records: list[dict[str, Any]] = []
    spent, last = 0.0, time.perf_counter()

    def measure(step: int, _total: int, _loss: float) -> None:
        nonlocal spent, last
        if step + 1 not in task.checkpoints:
            return
        spent += time.perf_counter() - last
        for way, drawer in objective.drawers(folder / "models" / task.name, step + 1).items():
            measured, images = bench.measure(drawer)
            about = {
                "method": method.name,
                "trained_as": task.method,
                "variant": "".join((variant, "," if variant and way else "", way)),
                "concept_name": task.concept,
                "steps": step + 1,
                "learning_rate": task.rate,
                "training_seconds": round(spent, 1),
            }
            records.append(about | measured)
            sheet = folder / "sheets" / f"{task.name}{way}-{step + 1}.png"
            sheet.parent.mkdir(parents=True, exist_ok=True)
            grid(images[:: task.seeds], columns=len(bench.prompts)).save(sheet)
        last = time.perf_counter()

    own = dict(method.extra)
    if method.options is ICOOptions:
        own["context_learning_rate"] = 10 * task.rate  # the paper's ratio
    options = method.options(
        steps=max(task.checkpoints),
        learning_rate=task.rate,
        batch_size=BATCH_SIZE,
        callback=measure,
        progress=False,
        **own,
    )
    prior = _prior(bench) if method.prior else None
    objective = method.make(bench.sd, reference_pictures(task.concept), bench.noun, options, prior)
    loop.run(objective, options)
    return records


def _prior(bench: Bench) -> Tensor:
    """Latents that the model itself draws of the class."""
    text, seeds = f"a photo of a {bench.noun}", list(range(5000, 5000 + _PRIOR_PICTURES))
    return bench.sd.generate(
        text, images_per_prompt=len(seeds), seed=seeds, output="latent", progress=False, **DRAWING
    ).images


def tuning_tasks(methods: Sequence[str], judge: str) -> list[Task]:
    """Every learning rate of every method, on the one concept that is not studied."""
    owners = dict.fromkeys(name if isinstance(METHODS[name].rates, tuple) else METHODS[name].rates for name in methods)
    return [
        Task(str(name), TUNED_ON, float(rate), (250,), 2, judge) for name in owners for rate in METHODS[str(name)].rates
    ]


def chosen_rates(tuning: Sequence[dict[str, Any]]) -> dict[str, float]:
    """By method the rate with the largest product of likeness, object and context."""
    scores: dict[tuple[str, float], list[float]] = {}
    for record in tuning:
        likeness, noun, context = (record[name]["mean"] for name in ("likeness", "object", "context"))
        scores.setdefault((record["trained_as"], record["learning_rate"]), []).append(likeness * noun * context)
    ranked = sorted(scores, key=lambda one: sum(scores[one]) / len(scores[one]))
    rates = dict(ranked)  # of each method the last one, which is the best, stays
    owners = {name: name if isinstance(one.rates, tuple) else one.rates for name, one in METHODS.items()}
    return {name: rates[owner] for name, owner in owners.items() if owner in rates}


def run_all(tasks: Sequence[Task], folder: Path, jobs: int) -> list[dict[str, Any]]:
    """All records, in the tasks' order; ``jobs`` processes of one thread each."""
    found: dict[str, list[dict[str, Any]]] = {}
    with processes(jobs) as pool:
        futures = {pool.submit(run, task, folder): task for task in tasks}
        start = time.perf_counter()
        for future in as_completed(futures):
            task = futures[future]
            found[task.name] = future.result()
            print(f"{time.perf_counter() - start:6.0f} s  {len(found)}/{len(tasks)} {task.name}", flush=True)
            for record in found[task.name]:
                shares = {name: record[name]["mean"] for name in ("concept", "likeness", "object", "context", "layout")}
                print("   ", record["method"], record["variant"], record["steps"], shares, flush=True)
    return [record for task in tasks for record in found[task.name]]


def _commits(result: dict[str, Any], concepts: set[str]) -> dict[str, str]:
    """By concept the commit that its records are of."""
    told = result["settings"].get("commits", {})
    return {concept: told.get(concept, result["machine"]["commit"]) for concept in concepts}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", nargs="+", default=list(STUDIED), choices=list(CONCEPTS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--checkpoints", nargs="+", type=int, default=list(CHECKPOINTS))
    parser.add_argument("--seeds", type=int, default=4, help="pictures per prompt")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one thread each")
    parser.add_argument("--judge", default="whole", choices=list(JUDGES), help="small: less often right, sooner there")
    parser.add_argument("--rates", type=Path, help="an earlier study whose learning rates to take, not tuning anew")
    parser.add_argument("--add-to", type=Path, help="an earlier study whose rates and records to keep")
    parser.add_argument(
        "--out", type=Path, default=Path("out/study"), help="folder for what is done, sheets and judges"
    )
    parser.add_argument("--result", type=Path, default=RESULTS / f"study-{date.today().isoformat()}.json")
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    judge = JUDGES[arguments.judge](arguments.out)  # trained once, before there are several processes
    before = arguments.add_to or arguments.rates
    if arguments.add_to is not None:
        earlier = json.loads(arguments.add_to.read_text())
        if (told := earlier["settings"].get("judge", "whole")) != arguments.judge:
            raise ValueError(f"judge must be that of {arguments.add_to}, {told!r}, got {arguments.judge!r}")
    if before is None:
        tuning = run_all(tuning_tasks(arguments.methods, arguments.judge), arguments.out, arguments.jobs)
    else:
        tuning = json.loads(before.read_text())["tuning"]
    rates, checkpoints = chosen_rates(tuning), tuple(arguments.checkpoints)
    tasks = [Task("base", concept, 0.0, (0,), arguments.seeds, arguments.judge) for concept in arguments.concepts]
    tasks += [
        Task(method, concept, rates[method], checkpoints, arguments.seeds, arguments.judge)
        for concept in arguments.concepts
        for method in arguments.methods
    ]
    records = run_all(tasks, arguments.out, arguments.jobs)
    about, seconds = machine(), time.perf_counter() - start
    commits = dict.fromkeys(arguments.concepts, about["commit"])
    if arguments.add_to is not None:
        known = {(record["trained_as"], record["concept_name"]) for record in records}
        kept = [one for one in earlier["study"] if (one["trained_as"], one["concept_name"]) not in known]
        records = [*kept, *records]
        commits = _commits(earlier, {one["concept_name"] for one in kept}) | commits
        seconds += earlier["settings"]["wall_seconds"]
    settings = {
        "drawing": DRAWING,
        "batch_size": BATCH_SIZE,
        "seeds": arguments.seeds,
        "prompts": [prompt.text for prompt in study_prompts("cat")],
        "tuned_on": TUNED_ON,
        "rates": rates,
        "jobs": arguments.jobs,
        "judge": arguments.judge,
        "judge_accuracy": judge.accuracy,
        "wall_seconds": round(seconds),
        "commits": commits,
    }
    write_result(arguments.result, about, {"settings": settings, "tuning": tuning, "study": records})


if __name__ == "__main__":
    main()
