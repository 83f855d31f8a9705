"""Train custom concepts and measure what Infusion does with them: ``python -m benchmarks.tinyworld.infusion_study``.

For every concept, space and kind of foundation: how often pictures in all ten contexts show the concept, and how often
background and object are right, beside the foundation's own pictures for the same prompts and seeds. All settings are
the library's defaults, or with ``--tuned`` the small model's own. Writes its set of records into
``benchmarks/results/infusion-tinyworld.json``; with ``--ship`` the text-space concepts become the demo's.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import engine
from benchmarks.machine import RESULTS
from benchmarks.tinyworld.backgrounds import BACKGROUNDS
from benchmarks.tinyworld.concepts import CONCEPTS, reference_pictures
from benchmarks.tinyworld.object_judge import ObjectJudge, object_judge
from benchmarks.tinyworld.studies import (
    DRAWING,
    Judge,
    Settings,
    defaults_of,
    side_by_side,
    with_changes,
    write_set,
)
from engine.observe.sheet import grid
from engine.weights.checkpoint import ASSETS

SHIPPED = ASSETS / "concepts"
_TRAINING = ("steps", "learning_rate", "batch_size", "accumulation_steps", "masks")
DEFAULTS: Settings = {"training": defaults_of(engine.train_infusion, *_TRAINING), "drawing": DRAWING}
TUNED: Settings = {"training": {"learning_rate": 0.03, "accumulation_steps": 4}, "drawing": {"guidance_scale": 4.0}}


def study_space(
    name: str, space: str, objects: ObjectJudge, settings: Settings, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Train one concept in one space, and measure it under both kinds of foundation."""
    sd, noun, records = engine.load(), CONCEPTS[name].noun, []
    judge = Judge(sd, name, arguments.seeds, objects, settings["drawing"])
    start = time.perf_counter()
    training = settings["training"]
    concept = engine.train_infusion(sd, reference_pictures(name), noun, space=space, progress=False, **training)
    about = {"training_seconds": round(time.perf_counter() - start, 1), **judge.accuracies()}
    concept.save(arguments.out / f"{name}-{space}.safetensors")
    if arguments.ship and space == "text":
        SHIPPED.mkdir(exist_ok=True)
        concept.save(SHIPPED / f"{name}.safetensors")
    for foundation in ("parallel", "shared"):
        drawn = judge.draw(noun, engine.Infusion([concept], foundation=foundation))
        measured = {"customised": judge(drawn.images)}
        if drawn.foundation_images is not None:
            measured["foundation_pictures"] = judge(drawn.foundation_images)
            pairs = [*drawn.foundation_images[:: judge.seeds], *drawn.images[:: judge.seeds]]
            grid(pairs, columns=len(BACKGROUNDS)).save(arguments.out / f"{name}-{space}.png")
        records.append({"concept": name, "space": space, "foundation": foundation, **about, **measured})
        print(json.dumps(records[-1]), flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", nargs="+", default=list(CONCEPTS), choices=list(CONCEPTS))
    parser.add_argument("--spaces", nargs="+", default=["text", "value"], choices=["text", "value"])
    parser.add_argument("--tuned", action="store_true", help="the small model's settings, not the library's defaults")
    parser.add_argument("--seeds", type=int, default=2, help="pictures per context")
    parser.add_argument("--out", type=Path, default=Path("out/infusion"), help="folder for sheets and concepts")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, each with its share of the threads")
    parser.add_argument("--ship", action="store_true", help="write the text-space concepts to engine/assets/concepts")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    changes = TUNED if arguments.tuned else {}
    settings, objects = with_changes(DEFAULTS, changes), object_judge(arguments.out)
    tasks = [(name, space, objects, settings, arguments) for name in arguments.concepts for space in arguments.spaces]
    about = settings | {"changed": changes, "contexts": len(BACKGROUNDS), "seeds": arguments.seeds}
    records: list[dict[str, Any]] = []
    for found in side_by_side(study_space, tasks, arguments.jobs):
        records += found
        set_name = "tuned" if arguments.tuned else "defaults"
        write_set(RESULTS / "infusion-tinyworld.json", "infusion", set_name, about | {"jobs": arguments.jobs}, records)


if __name__ == "__main__":
    main()
