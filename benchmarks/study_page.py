"""Write ``docs/study.md`` and its figures from the newest results: ``python -m benchmarks.study_page [--check]``.

``--check`` only tells whether the page is current. Figures need the ``plots`` extra.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS
from benchmarks.study_parts import (
    draw_layout,
    draw_sweeps,
    layout_parts,
    machine_line,
    mean,
    percent,
    percent_within,
    sweep_parts,
    table,
)
from benchmarks.tinyworld.study import METHODS

DOCS = Path(__file__).parent.parent / "docs"
PAGE, FIGURE, TEMPLATE = DOCS / "study.md", DOCS / "study-curves.png", Path(__file__).parent / "study_page.md"
Record = dict[str, Any]
_NAMES = {
    "base": "the base model",
    "infusion": "Infusion",
    "ico": "ICO",
    "dci": "ICO with DCI",
    "textual_inversion": "textual inversion",
    "dreambooth": "DreamBooth",
    "lora": "DreamBooth-LoRA",
    "custom_diffusion": "Custom Diffusion",
    "perfusion": "Perfusion",
}
_KINDS = {
    "place": "new place",
    "colour": "other colour",
    "style": "style",
    "added": "added object",
    "two": "two objects",
}


def newest(kind: str = "study") -> Path:
    """The latest result of "study", "layout" or "sweeps"."""
    return max(RESULTS.glob(f"{kind}-*.json"))


def page(path: Path, layout: Path, sweeps: Path) -> str:
    """The page as Markdown, of three results."""
    result = json.loads(path.read_text())
    settings, records = result["settings"], result["study"]
    concepts = list(dict.fromkeys(record["concept_name"] for record in records))
    last = max(record["steps"] for record in records)
    trained = [record for record in records if record["steps"]]
    checkpoints = sorted({record["steps"] for record in trained})
    drawing = settings["drawing"]
    base = [record for record in records if record["method"] == "base"]
    recall = ", ".join(f"{one['concept_name']} {100 * one['judge_recall']:.0f} %" for one in base)
    parts = {
        "file": path.name,
        "concepts": ", ".join(concepts),
        "batch_size": settings["batch_size"],
        "checkpoints": ", ".join(map(str, checkpoints)),
        "tuned_on": settings["tuned_on"],
        "n_prompts": len(settings["prompts"]),
        "seeds": settings["seeds"],
        "n_pictures": len(settings["prompts"]) * settings["seeds"],
        "drawing": f"{drawing['sampler']} at {drawing['steps']} steps, guidance {drawing['guidance_scale']:g}",
        "machine": machine_line(result) + _other_commits(result),
        "jobs": settings["jobs"],
        "recall": recall,
        "missing": _missing(trained, concepts),
        "last": last,
        "main": _main_table(records, last),
        "over_steps": _steps_table(trained, checkpoints),
        "kinds": _kinds_table(records, last),
        "tuning": _tuning_table(result["tuning"], settings["rates"]),
        **layout_parts(layout),
        **sweep_parts(sweeps),
    }
    return TEMPLATE.read_text().format(**parts)


def _missing(trained: Sequence[Record], concepts: Sequence[str]) -> str:
    """What of the methods is not there, concept by concept."""
    wanted = [name for name in METHODS if name != "base"]
    found = {concept: {one["trained_as"] for one in trained if one["concept_name"] == concept} for concept in concepts}
    lacking = [f"{concept}: {', '.join(n for n in wanted if n not in own)}" for concept, own in found.items()]
    lacking = [one for one in lacking if not one.endswith(": ")]
    return "; ".join(lacking) or "none of the methods"


def _key(record: Record) -> tuple[str, str]:
    return record["method"], record["variant"]


def _name(method: str, variant: str) -> str:
    words = {"prior": "with prior", "dci": "with DCI"}
    told = ", ".join(words.get(part, part) for part in variant.split(",") if part)
    return _NAMES[method] + (f", {told}" if told else "")


def _groups(records: Sequence[Record], steps: int | None) -> dict[tuple[str, str], list[Record]]:
    """Records of each method at one checkpoint, and the base's."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if steps is None or record["steps"] in (0, steps):
            found.setdefault(_key(record), []).append(record)
    return found


def _main_table(records: Sequence[Record], steps: int) -> str:
    heads = ("method", "likeness %", "seen %", "object %", "context %", "layout %", "CLIP-T", "CLIP-I", "diversity",
             "places", "Fisher, others", "Fisher, noun", "W2", "bytes", "training s", "s a picture")  # fmt: skip
    rows = []
    for key, group in _groups(records, steps).items():
        shares = ("likeness", "concept", "object", "context", "layout")
        row = [_name(*key), *(percent_within(group, name) for name in shares)]
        row += [f"{mean(group, lambda one, n=name: one[n]['mean']):.3f}" for name in ("clip_t", "clip_i")]
        row.append(f"{mean(group, lambda one: one['diversity']['pairwise']):.3f}")
        row.append(f"{mean(group, lambda one: one['diversity']['backgrounds']):.1f}")
        row += [
            f"{mean(group, lambda one, n=kind: one['fisher'][n]['total']['mean']):.3g}" for kind in ("other", "noun")
        ]
        is_base = key[0] == "base"
        row.append(f"{mean(group, lambda one: one['wasserstein']['w2']):.1f}{' (floor)' if is_base else ''}")
        row += ["" if is_base else f"{group[0]['bytes']:,}"]
        row += ["" if is_base else f"{mean(group, lambda one: one['training_seconds']):.0f}"]
        row.append(f"{mean(group, lambda one: one['seconds_per_picture']):.2f}")
        rows.append(row)
    return table(heads, rows)


def _steps_table(records: Sequence[Record], checkpoints: Sequence[int]) -> str:
    rows = []
    for key in _groups(records, None):
        row = [_name(*key)]
        for steps in checkpoints:
            group = [record for record in records if _key(record) == key and record["steps"] == steps]
            if not group:
                row.append("not measured")
                continue
            shares = " / ".join(percent(group, name) for name in ("likeness", "context", "layout"))
            row.append(f"{shares}, {mean(group, lambda one: one['wasserstein']['w2']):.1f}")
        rows.append(row)
    return table(["method", *(f"{steps} steps" for steps in checkpoints)], rows)


def _other_commits(result: Record) -> str:
    """Which concepts were measured at another commit than the last ones."""
    told, own = result["settings"].get("commits", {}), result["machine"]["commit"]
    others = [f"{concept} at {commit[:9]}" for concept, commit in told.items() if commit != own]
    return f" ({', '.join(others)})" if others else ""


def _kinds_table(records: Sequence[Record], steps: int) -> str:
    rows = []
    for key, group in _groups(records, steps).items():
        cells = []
        for kind in _KINDS:
            parts = (
                f"{100 * mean(group, lambda one, k=kind, n=name: one['by_kind'][k][n]):.0f}"
                for name in ("likeness", "context")
            )
            cells.append(" / ".join(parts))
        rows.append([_name(*key), *cells])
    return table(["method", *_KINDS.values()], rows)


def _tuning_table(tuning: Sequence[Record], rates: dict[str, float]) -> str:
    rows = []
    for record in tuning:
        likeness, noun, context = (record[name]["mean"] for name in ("likeness", "object", "context"))
        is_chosen = rates.get(record["trained_as"]) == record["learning_rate"]
        cells = [f"{record['learning_rate']:g}{' (chosen)' if is_chosen else ''}", str(record["steps"])]
        scores = [f"{100 * value:.0f}" for value in (likeness, noun, context, likeness * noun * context)]
        rows.append([_name(*_key(record)), *cells, *scores])
    return table(["method", "rate", "steps", "likeness %", "object %", "context %", "score %"], rows)


def draw(path: Path) -> None:
    """Context over likeness, a line through each method's checkpoints (compare DCI, figure 6)."""
    import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

    records = [record for record in json.loads(path.read_text())["study"] if record["steps"]]
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
    for axis, (across, down), labels in (
        (axes[0], ("likeness", "context"), ("likeness to the concept", "the prompt's context is right")),
        (axes[1], ("likeness", "layout"), ("likeness to the concept", "overlap with the base's silhouette")),
    ):
        for i, key in enumerate(_groups(records, None)):
            steps = sorted({record["steps"] for record in records if _key(record) == key})
            groups = [[r for r in records if _key(r) == key and r["steps"] == one] for one in steps]
            x, y = ([mean(group, lambda r, n=name: r[n]["mean"]) for group in groups] for name in (across, down))
            axis.plot(x, y, marker="osv^Dp*hXP<>"[i % 12], color=f"C{i % 10}", label=_name(*key), alpha=0.9)
            axis.annotate(str(steps[-1]), (x[-1], y[-1]), fontsize=8, xytext=(4, 3), textcoords="offset points")
        axis.set_xlabel(labels[0], fontsize=11)
        axis.set_ylabel(labels[1], fontsize=11)
        axis.set_xlim(-0.03, 1.03)
        axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    figure.suptitle(
        "Every method over its training steps, from the first checkpoint to the last (numbered)", fontsize=12
    )
    figure.savefig(FIGURE, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only tell whether the page is current")
    arguments = parser.parse_args()
    results = newest(), newest("layout"), newest("sweeps")
    text = page(*results)
    if arguments.check:
        sys.exit(0 if PAGE.read_text() == text else f"{PAGE} is not current: python -m benchmarks.study_page")
    PAGE.write_text(text)
    draw(results[0])
    draw_layout(results[1], DOCS / "study-layout.png")
    draw_sweeps(results[2], DOCS / "study-sweeps.png")


if __name__ == "__main__":
    main()
