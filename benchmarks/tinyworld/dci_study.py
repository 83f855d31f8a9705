"""Train ICO concepts and measure what DCI does with them: ``python -m benchmarks.tinyworld.dci_study``.

For each concept: how often pictures show it, and how often the background is right, with ICO alone, over strengths,
over fractions and for each ablation; how far the gates spread at each scale; and what low-rank files lose. All settings
are the library's defaults, or with ``--tuned`` the small model's own. Writes its set of records into
``benchmarks/results/dci-tinyworld.json``, and figures (needs the ``plots`` extra).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import engine
from benchmarks.machine import RESULTS
from benchmarks.systems import default_request
from benchmarks.tinyworld.backgrounds import BACKGROUNDS
from benchmarks.tinyworld.concepts import CONCEPTS, reference_pictures
from benchmarks.tinyworld.figures import masks_figure, pictures_figure
from benchmarks.tinyworld.object_judge import ObjectJudge, object_judge
from benchmarks.tinyworld.studies import (
    DRAWING,
    Judge,
    Settings,
    defaults_of,
    prompts,
    side_by_side,
    with_changes,
    write_set,
)
from engine.methods.dci import PRESETS
from engine.observe.progress import StageClock
from engine.sampling.loop import denoise

STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)
FRACTIONS = (0.0, 0.15, 0.4, 1.0)
ABLATIONS: dict[str, dict[str, Any]] = {
    "all of it": {},
    "no masks": {"masked": False},
    "separate prompts": {"separate_prompts": True},
    "last layer only": {"last_layer_only": True},
}
RANKS = (8, 16, 32)
_AUXILIARY = {"cat": "dog", "dog": "cat", "car": "boat", "teapot": "mug", "backpack": "shoe"}
_TRAINING = ("steps", "scheme", "learning_rate", "context_learning_rate", "batch_size", "accumulation_steps")
DEFAULTS: Settings = {
    "training": defaults_of(engine.train_ico, *_TRAINING),
    "drawing": DRAWING,
    "dci": defaults_of(engine.DCI, "auxiliary_noun", "strength", "fraction", "preset", "gain"),
}
TUNED: Settings = {
    "training": {"steps": 400, "learning_rate": 4e-4, "context_learning_rate": 1e-2},
    "drawing": {"guidance_scale": 4.0},
    "dci": {"auxiliary_noun": _AUXILIARY, "fraction": 0.4},
}
_FIGURE_CONTEXTS = (0, 2, 6)  # beach, snow, room
_TITLES = {
    "strength": "growing strengths",
    "fraction": "growing fractions of mixing steps",
    "ablation": "parts left out",
}


def study(judge: Judge, concept: engine.Concept, dci: engine.DCI, out: Path, set_name: str) -> dict[str, Any]:
    """Every sweep of one concept; figures go to ``out``."""
    name = judge.name
    phrase = dci.phrase
    alone = judge.draw(phrase, engine.ICO([concept])).images
    found: dict[str, Any] = {"ico": judge(alone), "strength": [], "fraction": [], "ablation": []}
    columns: dict[str, dict[str, list[Image.Image]]] = {sweep: {"ICO alone": alone} for sweep in _TITLES}
    settings = [("strength", value, {"strength": value}) for value in STRENGTHS]
    settings += [("fraction", value, {"fraction": value}) for value in FRACTIONS]
    settings += [("ablation", what, changes) for what, changes in ABLATIONS.items()]
    drawn: dict[str, tuple[list[Image.Image], dict[str, Any]]] = {}  # the sweeps have one setting in common
    for sweep, value, changes in settings:
        custom = replace(dci, **changes)
        key = json.dumps(custom.settings())
        if key not in drawn:
            images = judge.draw(phrase, custom).images
            drawn[key] = images, judge(images)
        images, measured = drawn[key]
        found[sweep].append({"value": value, **measured})
        heading = value if isinstance(value, str) else f"{sweep} {value:g}"
        columns[sweep][heading] = images
        print(name, sweep, value, {what: round(one["share"], 2) for what, one in measured.items()}, flush=True)
    for sweep, drawings in columns.items():
        rows = [[images[context * judge.seeds] for images in drawings.values()] for context in _FIGURE_CONTEXTS]
        row_names = [BACKGROUNDS[context] for context in _FIGURE_CONTEXTS]
        title = f"{name}: ICO alone, and DCI with {_TITLES[sweep]} ({set_name} settings, seed 0)"
        pictures_figure(rows, row_names, list(drawings), title, out / f"{name}-{sweep}.png")
    return found


class _Gates:
    """Collects both branches' masks by layer, in place of a ``MaskRecorder``."""

    def __init__(self) -> None:
        self.masks: dict[int, list[Tensor]] = {}

    def watching(self, _images: Sequence[int]):
        return lambda layer, masks: self.masks.setdefault(layer, []).append(masks.cpu())

    def forget_step(self) -> None: ...

    def keep_step(self) -> None: ...


@torch.no_grad()
def spread(sd: engine.Engine, prompt: str, dci: engine.DCI, drawing: dict[str, Any]) -> list[dict[str, float]]:
    """How the concept's weight w = sigmoid(s_c - lambda s_a) is distributed at each scale, over steps and heads."""
    request = default_request(sd, prompt, customization=dci, seed=0, **drawing)
    gates: Any = _Gates()
    denoising = replace(sd.begin(request, StageClock(sd.device)), mask_recorder=gates)
    denoise(sd.stepper(), denoising, lambda _i, _x: True)
    mixing = denoising.plans[0].rows.batch.mixing
    assert mixing is not None
    strength, _, _, gain = mixing.gates[0].tolist()
    weights: dict[int, list[Tensor]] = {}
    for masks in gates.masks.values():
        concept, auxiliary = torch.stack(masks).chunk(2, dim=1)
        w = torch.sigmoid(gain * (concept - strength * auxiliary))
        weights.setdefault(w.shape[-1], []).append(w.flatten())
    rows = []
    for n_positions in sorted(weights, reverse=True):
        w = torch.cat(weights[n_positions])
        low, middle, high = torch.quantile(w[torch.randperm(len(w))[:200_000]], torch.tensor([0.01, 0.5, 0.99]))
        rows.append({"positions": n_positions, "p1": float(low), "median": float(middle), "p99": float(high)})
    return rows


def compression(concept: engine.Concept) -> list[dict[str, float]]:
    """Bytes and relative error of the changes, whole and at each rank."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for rank in (None, *RANKS):
            path = Path(folder) / "concept.safetensors"
            concept.save(path, rank=rank)
            error = engine.Concept.load(path).training.get("compression_error", 0.0)
            rows.append({"rank": rank, "bytes": path.stat().st_size, "error": error})
    return rows


def study_concept(name: str, objects: ObjectJudge, settings: Settings, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one concept."""
    sd, noun, start = engine.load(), CONCEPTS[name].noun, time.perf_counter()
    concept = engine.train_ico(sd, reference_pictures(name), noun, progress=False, **settings["training"])
    seconds = time.perf_counter() - start
    concept.save(arguments.out / f"{name}.safetensors")
    auxiliary = settings["dci"]["auxiliary_noun"]
    auxiliary = auxiliary[noun] if isinstance(auxiliary, dict) else auxiliary
    dci = engine.DCI(concept, **(settings["dci"] | {"auxiliary_noun": auxiliary}))
    prompt = prompts(dci.phrase)[0]
    judge = Judge(sd, name, arguments.seeds, objects, settings["drawing"])
    whole, drawing = replace(dci, fraction=1.0), settings["drawing"]
    out = sd.generate(prompt, seed=0, customization=whole, record_masks=True, progress=False, **drawing)
    assert out.masks is not None
    assert out.masks[0] is not None
    title = (
        f'The other branch\'s masks, "{dci.auxiliary}" in place of "{dci.phrase}", mean over {drawing["steps"]} steps'
    )
    masks_figure(out.images[0], out.masks[0], title, arguments.out / f"{name}-masks.png")
    return {
        "concept": name,
        "auxiliary_noun": dci.auxiliary,
        "training_seconds": round(seconds, 1),
        **judge.accuracies(),
        "compression": compression(concept),
        "spread": {preset: spread(sd, prompt, replace(whole, preset=preset, gain=None), drawing) for preset in PRESETS},
        **study(judge, concept, dci, arguments.out, "the library's default" if not arguments.tuned else "tuned"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", nargs="+", default=list(CONCEPTS), choices=list(CONCEPTS))
    parser.add_argument("--tuned", action="store_true", help="the small model's settings, not the library's defaults")
    parser.add_argument("--seeds", type=int, default=2, help="pictures per context")
    parser.add_argument("--out", type=Path, default=Path("out/dci"), help="folder for figures and concepts")
    parser.add_argument("--jobs", type=int, default=1, help="concepts at a time, each with its share of the threads")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    changes = TUNED if arguments.tuned else {}
    settings, objects = with_changes(DEFAULTS, changes), object_judge(arguments.out)
    tasks = [(name, objects, settings, arguments) for name in arguments.concepts]
    about = settings | {"changed": changes, "contexts": len(BACKGROUNDS), "seeds": arguments.seeds}
    records: list[dict[str, Any]] = []
    for record in side_by_side(study_concept, tasks, arguments.jobs):
        records.append(record)
        set_name = "tuned" if arguments.tuned else "defaults"
        write_set(RESULTS / "dci-tinyworld.json", "dci", set_name, about | {"jobs": arguments.jobs}, records)


if __name__ == "__main__":
    main()
