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
from benchmarks.machine import RESULTS, machine
from benchmarks.tinyworld.backgrounds import BACKGROUNDS
from benchmarks.tinyworld.captions import full_prompt
from benchmarks.tinyworld.concept_judge import ConceptJudge
from benchmarks.tinyworld.concepts import CONCEPTS, reference_pictures
from benchmarks.tinyworld.data import grid, to_tensor
from benchmarks.tinyworld.evaluate import interval
from benchmarks.tinyworld.evaluator import load_evaluator
from benchmarks.tinyworld.jobs import side_by_side
from benchmarks.tinyworld.scene import Scene, Thing
from engine.checkpoint import ASSETS

SHIPPED = ASSETS / "concepts"
_STEPS, _GUIDANCE = 50, 4.0


def prompts(noun: str) -> list[str]:
    """One prompt per background; the colour is left to the model."""
    scenes = (Scene((Thing(noun, ""),), background, "blue") for background in BACKGROUNDS)
    return [full_prompt(scene) for scene in scenes]


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
    noun, evaluator = CONCEPTS[name].noun, load_evaluator()
    judge, seeds = ConceptJudge(name, evaluator), arguments.seeds
    start = time.perf_counter()
    options = {"steps": arguments.train_steps, "accumulation_steps": arguments.accumulation_steps, "progress": False}
    concept = engine.train_infusion(sd, reference_pictures(name), noun, space=space, **options)
    training_seconds = time.perf_counter() - start
    texts, records = prompts(noun), []
    for foundation in ("parallel", "shared"):
        drawn = sd.generate(
            texts,
            images_per_prompt=seeds,
            seed=list(range(seeds)) * len(texts),
            steps=_STEPS,
            guidance_scale=_GUIDANCE,
            customization=engine.Infusion([concept], foundation=foundation),
            progress=False,
        )
        kinds = {"customised": drawn.images}
        if drawn.foundation_images is not None:
            kinds["foundation_pictures"] = drawn.foundation_images
            sheet = grid([*drawn.foundation_images[::seeds], *drawn.images[::seeds]], columns=len(texts))
            sheet.save(arguments.out / f"{name}-{space}.png")
        measured = {}
        for kind, images in kinds.items():
            pictures = to_tensor(images)
            seen = evaluator.classify(pictures)
            wanted = [background for background in BACKGROUNDS for _ in range(seeds)]
            verdicts = {
                "concept": judge(pictures),
                "background": [one.background == background for one, background in zip(seen, wanted, strict=True)],
                "object": [next(iter(one.confidence)) == noun for one in seen],
            }
            measured[kind] = {
                what: {"share": sum(right) / len(right), "interval": interval(right), "n": len(right)}
                for what, right in verdicts.items()
            }
        records.append(
            {
                "concept": name,
                "space": space,
                "foundation": foundation,
                "train_steps": arguments.train_steps,
                "training_seconds": round(training_seconds, 1),
                "judge_accuracy": judge.accuracy,
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
    parser.add_argument("--out", type=Path, default=Path("out/infusion"), help="folder for sheets")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, each with its share of the threads")
    parser.add_argument("--ship", action="store_true", help="write the text-space concepts to engine/assets/concepts")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tasks = [(name, space, arguments) for name in arguments.concepts for space in arguments.spaces]
    records = side_by_side(study_space, tasks, arguments.jobs)
    settings = {"steps": _STEPS, "guidance_scale": _GUIDANCE, "contexts": len(BACKGROUNDS)}
    settings |= {name: getattr(arguments, name) for name in ("seeds", "accumulation_steps", "jobs")}
    record = {"machine": machine(), "settings": settings, "infusion": [record for found in records for record in found]}
    (RESULTS / "infusion-tinyworld.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
