"""Train ICO concepts and measure what DCI does with them: ``python -m benchmarks.tinyworld.dci_study``.

For each concept: how often pictures show it, and how often the background is right, with ICO alone, over strengths,
over fractions and for each ablation; how far the gates spread at each scale; and what low-rank files lose. Writes
``benchmarks/results/dci-tinyworld.json`` and figures.
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
from benchmarks.machine import RESULTS, machine, write_result
from benchmarks.systems import default_request
from benchmarks.tinyworld.backgrounds import BACKGROUNDS
from benchmarks.tinyworld.concepts import CONCEPTS, reference_pictures
from benchmarks.tinyworld.studies import GUIDANCE_SCALE, STEPS, Judge, prompts, side_by_side
from engine.methods.concept_cache import Texts
from engine.methods.dci import PRESETS
from engine.observe.sheet import grid
from engine.sampling.loop import denoise
from engine.sampling.plan import make_plans
from engine.sampling.samplers import make_table
from engine.sampling.start import start

STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)
FRACTIONS = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0)
ABLATIONS: dict[str, dict[str, Any]] = {
    "all of it": {},
    "no masks": {"masked": False},
    "separate prompts": {"separate_prompts": True},
    "last layer only": {"last_layer_only": True},
}
RANKS = (8, 16, 32)
_AUXILIARY = {"cat": "dog", "dog": "cat", "car": "boat", "teapot": "mug", "backpack": "shoe"}
_RATES = ("learning_rate", "context_learning_rate")
_FIGURE_CONTEXTS = (0, 2, 6)  # beach, snow, room


def study(judge: Judge, concept: engine.Concept, dci: engine.DCI, out: Path, name: str) -> dict[str, Any]:
    """Every sweep of one concept; figures go to ``out``."""
    phrase = dci.phrase
    alone = judge.draw(phrase, engine.ICO([concept])).images
    found: dict[str, Any] = {"ico": judge(alone), "strength": [], "fraction": [], "ablation": []}
    columns: dict[str, list[list[Image.Image]]] = {"strength": [alone], "fraction": [], "ablation": [alone]}
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
        columns[sweep].append(images)
        print(name, sweep, value, {what: round(one["share"], 2) for what, one in measured.items()}, flush=True)
    for sweep, pictures in columns.items():
        rows = [column[context * judge.seeds] for context in _FIGURE_CONTEXTS for column in pictures]
        grid(rows, columns=len(pictures)).save(out / f"{name}-{sweep}.png")
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
def spread(sd: engine.Engine, prompt: str, dci: engine.DCI) -> list[dict[str, float]]:
    """How the concept's weight w = sigmoid(s_c - lambda s_a) is distributed at each scale, over steps and heads."""
    request = default_request(sd, prompt, customization=dci, seed=0, steps=STEPS, guidance_scale=GUIDANCE_SCALE)
    table = make_table(request.options.sampler, sd.schedule, request.options.steps)
    plans = make_plans(request, len(table), Texts(sd.text_encoder), sd.concepts, sd.device)
    x, noise = start(request, table, sd._vae, sd.device)
    gates: Any = _Gates()
    denoise(sd.unet, table, plans, x, noise, lambda _i, _x: True, None, gates)
    mixing = plans[0].rows.batch.mixing
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


def study_concept(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one concept."""
    sd, noun, start = engine.load(), CONCEPTS[name].noun, time.perf_counter()
    rates = {which: getattr(arguments, which) for which in _RATES}
    options = {"steps": arguments.train_steps, "scheme": "dci", "progress": False}
    concept = engine.train_ico(sd, reference_pictures(name), noun, **rates, **options)
    seconds = time.perf_counter() - start
    concept.save(arguments.out / f"{name}.safetensors")
    settings = {which: getattr(arguments, which) for which in ("strength", "fraction", "gain")}
    dci = engine.DCI(concept, _AUXILIARY[noun], **settings)
    prompt, judge = prompts(dci.phrase)[0], Judge(sd, name, arguments.seeds)
    whole = replace(dci, fraction=1.0)
    out = sd.generate(
        prompt, seed=0, guidance_scale=GUIDANCE_SCALE, customization=whole, record_masks=True, progress=False
    )
    assert out.masks is not None
    assert out.masks[0] is not None
    out.masks[0].figure(out.images[0]).save(arguments.out / f"{name}-masks.png")
    return {
        "concept": name,
        "training_seconds": round(seconds, 1),
        "judge_accuracy": judge.concept_seen.accuracy,
        "compression": compression(concept),
        "spread": {preset: spread(sd, prompt, replace(whole, preset=preset, gain=None)) for preset in PRESETS},
        **study(judge, concept, dci, arguments.out, name),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", nargs="+", default=list(CONCEPTS), choices=list(CONCEPTS))
    parser.add_argument("--seeds", type=int, default=3, help="pictures per context")
    parser.add_argument("--train-steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--context-learning-rate", type=float, default=1e-2)
    parser.add_argument("--strength", type=float, default=1.0, help="of the sweeps that do not vary it")
    parser.add_argument("--fraction", type=float, default=0.4, help="of the sweeps that do not vary it")
    parser.add_argument("--gain", type=float, help="g, where the preset's is not wanted")
    parser.add_argument("--out", type=Path, default=Path("out/dci"), help="folder for figures and concepts")
    parser.add_argument("--jobs", type=int, default=1, help="concepts at a time, each with its share of the threads")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    records = side_by_side(study_concept, [(name, arguments) for name in arguments.concepts], arguments.jobs)
    settings = {"steps": STEPS, "guidance_scale": GUIDANCE_SCALE, "contexts": len(BACKGROUNDS)}
    settings |= {
        name: getattr(arguments, name) for name in (*_RATES, "seeds", "train_steps", "strength", "fraction", "gain")
    }
    write_result(RESULTS / "dci-tinyworld.json", machine(), {"settings": settings, "dci": records})


if __name__ == "__main__":
    main()
