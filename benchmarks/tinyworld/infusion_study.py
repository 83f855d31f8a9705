"""Train custom concepts and measure what Infusion does with them: ``python -m benchmarks.tinyworld.infusion_study``.

For every concept, space and kind of foundation: how often pictures in all ten contexts show the concept, and how often
the background is right, beside the foundation's own pictures for the same prompts and seeds. Writes
``benchmarks/results/infusion-tinyworld.json``; with ``--ship`` the text-space concepts become the demo's.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import engine
from benchmarks.machine import RESULTS, machine, write_result
from benchmarks.tinyworld.backgrounds import BACKGROUNDS
from benchmarks.tinyworld.concepts import CONCEPTS, reference_masks, reference_pictures
from benchmarks.tinyworld.studies import GUIDANCE_SCALE, STEPS, Judge, side_by_side
from engine.observe.sheet import grid
from engine.weights.checkpoint import ASSETS

SHIPPED = ASSETS / "concepts"


def study_space(name: str, space: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One space of one concept; with ``--ship`` the one in text space is saved for the demo."""
    concept, records = study(engine.load(), name, space, arguments)
    if arguments.ship and space == "text":
        SHIPPED.mkdir(exist_ok=True)
        concept.save(SHIPPED / f"{name}.safetensors")
    return records


def study(
    sd: engine.Engine, name: str, space: str, arguments: argparse.Namespace
) -> tuple[engine.Concept, list[dict[str, Any]]]:
    """Train one concept in one space, and measure it under both kinds of foundation."""
    noun, judge, records = CONCEPTS[name].noun, Judge(sd, name, arguments.seeds), []
    start = time.perf_counter()
    options = {"steps": arguments.train_steps, "accumulation_steps": arguments.accumulation_steps, "progress": False}
    options |= {"learning_rate": arguments.learning_rate, "masks": reference_masks(name) if arguments.masks else None}
    concept = engine.train_infusion(sd, reference_pictures(name), noun, space=space, **options)
    training_seconds = time.perf_counter() - start
    for foundation in ("parallel", "shared"):
        drawn = judge.draw(noun, engine.Infusion([concept], foundation=foundation))
        measured = {"customised": judge(drawn.images)}
        if drawn.foundation_images is not None:
            measured["foundation_pictures"] = judge(drawn.foundation_images)
            pairs = [*drawn.foundation_images[:: judge.seeds], *drawn.images[:: judge.seeds]]
            grid(pairs, columns=len(BACKGROUNDS)).save(arguments.out / f"{name}-{space}.png")
        records.append(
            {
                "concept": name,
                "space": space,
                "foundation": foundation,
                "train_steps": arguments.train_steps,
                "training_seconds": round(training_seconds, 1),
                "judge_accuracy": judge.concept_seen.accuracy,
                **measured,
            }
        )
        print(json.dumps(records[-1]), flush=True)
    return concept, records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", nargs="+", default=list(CONCEPTS), choices=list(CONCEPTS))
    parser.add_argument("--spaces", nargs="+", default=["text", "value"], choices=["text", "value"])
    parser.add_argument("--seeds", type=int, default=3, help="pictures per context")
    parser.add_argument("--train-steps", type=int, default=500)
    parser.add_argument("--accumulation-steps", type=int, default=4, help="of 4 pictures each")
    parser.add_argument("--learning-rate", type=float, default=0.03)
    parser.add_argument("--masks", action="store_true", help="train on the object's pixels alone")
    parser.add_argument("--out", type=Path, default=Path("out/infusion"), help="folder for sheets")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, each with its share of the threads")
    parser.add_argument("--ship", action="store_true", help="write the text-space concepts to engine/assets/concepts")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tasks = [(name, space, arguments) for name in arguments.concepts for space in arguments.spaces]
    records = side_by_side(study_space, tasks, arguments.jobs)
    settings = {"steps": STEPS, "guidance_scale": GUIDANCE_SCALE, "contexts": len(BACKGROUNDS)}
    kept = ("seeds", "accumulation_steps", "learning_rate", "masks", "jobs")
    settings |= {name: getattr(arguments, name) for name in kept}
    content = {"settings": settings, "infusion": [record for found in records for record in found]}
    write_result(RESULTS / "infusion-tinyworld.json", machine(), content)


if __name__ == "__main__":
    main()
