"""What each knob of both methods does: ``python -m benchmarks.tinyworld.sweeps``.

On the study's prompts: Infusion's strength and guidance; DCI's strength and fraction, and what each of its parts is
for; ICO's prompt schemes; and whether the study's sampler tells the same as the library's default. Sweeps run side by
side, one thread each; what is done lies in ``--out``. Writes ``benchmarks/results/sweeps-<date>.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from PIL import Image

import engine
from benchmarks.machine import RESULTS, machine, write_result
from benchmarks.tinyworld.bench import DRAWING, study_prompts
from benchmarks.tinyworld.concepts import CONCEPTS, reference_pictures
from benchmarks.tinyworld.look_judge import look_judge
from benchmarks.tinyworld.prompted import Prompted
from benchmarks.tinyworld.studies import side_by_side
from engine.train.ico import SCHEMES

GUIDANCES = (4.0, 8.0, 12.0)
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
LAMBDAS = (-2.0, -1.0, 0.0, 1.0, 2.0)
FRACTIONS = (0.0, 0.15, 0.4, 1.0)
FRACTION = 0.4  # where it does not vary
ABLATIONS = {
    "all of it": {},
    "no masks": {"masked": False},
    "separate prompts": {"separate_prompts": True},
    "last layer only": {"last_layer_only": True},
}
PROMPT_SCHEMES = ((0, 0, 3), (1, 1, 3), (4, 2, 2))  # M, L, S
INFUSION = {"steps": 250, "learning_rate": 0.03, "batch_size": 4}  # the study's
# dci_study's tuned rates, the batch smaller
TUNED_ICO = {"steps": 250, "learning_rate": 4e-4, "context_learning_rate": 1e-2, "batch_size": 4}
DEFAULT_DRAWING = {"sampler": "ddim", "steps": 50}
Record = dict[str, Any]


class SweepBench(Prompted):
    """Prompts of one concept, and what was learned of it, which sweeps share through files in ``folder``."""

    def __init__(self, concept: str, seeds: int, judges: Path, folder: Path) -> None:
        super().__init__(concept, seeds, judges)
        self.folder = folder

    def infusion(self) -> engine.Concept:
        return self._learned("infusion", engine.train_infusion, INFUSION)

    def ico(self, sizes: tuple[int, int, int] = SCHEMES["dci"]) -> engine.Concept:
        """In a prompt scheme of M, L and S tokens."""
        with _prompt_scheme(sizes):
            return self._learned(f"ico-{'-'.join(map(str, sizes))}", engine.train_ico, TUNED_ICO)

    def _learned(self, name: str, train: Callable[..., engine.Concept], options: dict[str, Any]) -> engine.Concept:
        path = self.folder / f"{self.concept}-{name}.safetensors"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            train(self.sd, reference_pictures(self.concept), self.noun, progress=False, **options).save(path)
        return engine.Concept.load(path)


def strength(bench: SweepBench) -> Iterator[Record]:
    concept = bench.infusion()
    out = bench.draw(bench.noun, [engine.Infusion([concept], strength=value) for value in STRENGTHS])
    base, n = bench.covers(_foundations(out, bench)), len(bench.numbers)
    for i, value in enumerate(STRENGTHS):
        yield {"sweep": "strength", "value": value, **bench.estimates(out.images[i * n : (i + 1) * n], base)}


def guidance(bench: SweepBench) -> Iterator[Record]:
    """Layout is against the base's pictures under the same guidance."""
    concept = bench.infusion()
    for value in GUIDANCES:
        out = bench.draw(bench.noun, [engine.Infusion([concept])], guidance_scale=value)
        base = bench.covers(_foundations(out, bench))
        yield {"sweep": "guidance", "value": value, **bench.estimates(out.images, base)}


def dci(bench: SweepBench) -> Iterator[Record]:
    concept = bench.ico()
    phrase = f"{concept.placeholder} {bench.noun}"
    customs: list[tuple[str, Any, Any]] = [("ablation", "ICO alone", engine.ICO([concept]))]
    changes: list[tuple[str, Any, dict[str, Any]]] = [("lambda", one, {"strength": one}) for one in LAMBDAS]
    changes += [("fraction", one, {"fraction": one}) for one in FRACTIONS]
    changes += [("ablation", name, parts) for name, parts in ABLATIONS.items()]
    customs += [(sweep, value, engine.DCI(concept, **{"fraction": FRACTION, **own})) for sweep, value, own in changes]
    drawn: dict[str, Record] = {}  # the sweeps have one setting in common
    for sweep, value, custom in customs:
        key = json.dumps(custom.settings())
        if key not in drawn:
            drawn[key] = bench.estimates(bench.draw(phrase, [custom]).images)
        yield {"sweep": sweep, "value": value, **drawn[key]}


def scheme(bench: SweepBench) -> Iterator[Record]:
    for sizes in PROMPT_SCHEMES:
        concept = bench.ico(sizes)
        images = bench.draw(f"{concept.placeholder} {bench.noun}", [engine.ICO([concept])]).images
        yield {"sweep": "scheme", "value": list(sizes), **bench.estimates(images)}


def sampler(bench: SweepBench) -> Iterator[Record]:
    """Both samplers' means, and the difference over the same prompts and seeds."""
    infusion, ico = engine.Infusion([bench.infusion()]), bench.ico()
    found: list[dict[str, dict[str, list[float]]]] = []
    for drawing in (DRAWING, DEFAULT_DRAWING):
        out = bench.draw(bench.noun, [infusion], **drawing)
        plain = _foundations(out, bench)
        tuned = bench.draw(f"{ico.placeholder} {bench.noun}", [engine.ICO([ico])], **drawing).images
        base = bench.covers(plain)
        pictures = {"the base model": plain, "Infusion": out.images, "ICO": tuned}
        found.append({model: bench.values(images, base) for model, images in pictures.items()})
    for model, ours in found[0].items():
        default = found[1][model]
        differences = {
            name: bench.estimate([b - a for a, b in zip(ours[name], default[name], strict=True)]) for name in ours
        }
        means = {name: [bench.estimate(one[name]) for one in (ours, default)] for name in ours}
        yield {"sweep": "sampler", "value": model, "both": means, "difference": differences}


def _foundations(out: engine.Result, bench: SweepBench) -> list[Image.Image]:
    """The base's pictures that customised ones follow, of the first customisation."""
    assert out.foundation_images is not None
    return out.foundation_images[: len(bench.numbers)]


SWEEPS: dict[str, Callable[[SweepBench], Iterator[Record]]] = {
    one.__name__: one for one in (strength, guidance, dci, scheme, sampler)
}


@contextmanager
def _prompt_scheme(sizes: tuple[int, int, int]) -> Iterator[None]:
    """``train_ico``'s default scheme is of these sizes within."""
    before, SCHEMES["dci"] = SCHEMES["dci"], sizes
    try:
        yield
    finally:
        SCHEMES["dci"] = before


def run(concept: str, name: str, seeds: int, out: Path, judges: Path) -> list[Record]:
    """One sweep's records of one concept, from ``out`` where they are there."""
    path = out / f"{concept}-{name}-{seeds}.json"
    if path.exists():
        return json.loads(path.read_text())
    records = []
    for record in SWEEPS[name](SweepBench(concept, seeds, judges, out / "learned")):
        records.append({"concept_name": concept, **record})
        print(concept, record["sweep"], record["value"], _means(record), flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))
    return records


def _means(record: Record) -> dict[str, float]:
    found = record.get("difference", record)
    return {name: found[name]["mean"] for name in ("likeness", "object", "context", "layout")}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", nargs="+", default=["striped-cat", "checkered-teapot"], choices=list(CONCEPTS))
    parser.add_argument("--sweeps", nargs="+", default=list(SWEEPS), choices=list(SWEEPS))
    parser.add_argument("--seeds", type=int, default=2, help="pictures per prompt")
    parser.add_argument("--jobs", type=int, default=2, help="sweeps at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("out/sweeps"), help="folder for what is done")
    parser.add_argument("--judges", type=Path, default=Path("out/study"), help="folder of the judge of looks")
    parser.add_argument("--result", type=Path, default=RESULTS / f"sweeps-{date.today().isoformat()}.json")
    arguments = parser.parse_args(argv)
    judge = look_judge(arguments.judges)
    calls = [
        (concept, name, arguments.seeds, arguments.out, arguments.judges)
        for name in arguments.sweeps
        for concept in arguments.concepts
    ]
    records = [record for found in side_by_side(run, calls, arguments.jobs, n_threads=1) for record in found]
    settings = {
        "drawing": DRAWING,
        "default_drawing": DEFAULT_DRAWING,
        "infusion": INFUSION,
        "ico": TUNED_ICO,
        "fraction": FRACTION,
        "seeds": arguments.seeds,
        "prompts": [prompt.text for prompt in study_prompts("cat")],
        "judge_accuracy": judge.accuracy,
    }
    write_result(arguments.result, machine(), {"settings": settings, "sweeps": records})


if __name__ == "__main__":
    main()
