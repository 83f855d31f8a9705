"""Tables and figures of ``docs/study.md`` beyond the study itself: where layout is lost, and what each knob does."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
METHOD = "the method"
_SHARES = ("likeness", "object", "context")
_APART = 0.03  # a training closer than this to the method's own has no label: they would lie upon one another
_LABELLED = (  # in the figure; the table names all
    "strength 0.5",
    METHOD,
    "layers of 16",
    "layers of 4 and 2",
    "until 40 % of the steps",
    "map cut to the object",
    "self-attention's maps, 100 %",
    "self-attention's maps, 100 %, and map cut",
)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean(records: Sequence[Record], read: Callable[[Record], float]) -> float:
    """Over records, of concepts say."""
    return sum(map(read, records)) / len(records)


def percent(records: Sequence[Record], name: str) -> str:
    """The mean of a share."""
    return f"{100 * mean(records, lambda one: one[name]['mean']):.0f}"


def percent_within(records: Sequence[Record], name: str) -> str:
    """The same with half of its 95 % interval, those of concepts combined as of independent samples."""
    halves = [(one[name]["interval"][1] - one[name]["interval"][0]) / 2 for one in records]
    return f"{percent(records, name)} ± {100 * sum(half**2 for half in halves) ** 0.5 / len(halves):.0f}"


def machine_line(result: Record) -> str:
    """What a result was measured on."""
    about = result["machine"]
    return f"{about['cpu']}, torch {about['versions']['torch']}, commit {about['commit'][:9]}, {about['date']}"


def layout_parts(path: Path) -> dict[str, str]:
    """What the template says of ``layout_study``'s result."""
    result = json.loads(path.read_text())
    bounds = {one["concept_name"]: one for one in result["layout"] if one["training"] == "bounds"}
    drawn = [one for one in result["layout"] if one["training"] != "bounds"]
    settings = result["settings"]
    return {
        "layout_file": path.name,
        "layout_machine": machine_line(result),
        "layout_concepts": " and ".join(bounds),
        "layout_steps": str(settings["training"]["steps"]),
        "layout_pictures": str(len(settings["prompts"]) * settings["seeds"]),
        "chance": _of_both(bounds, lambda one: one["chance"]["layout"]["mean"]),
        "ceiling": _of_both(bounds, lambda one: one["judge"]["layout"]["mean"]),
        "map_mass": _mass_table(list(bounds.values())),
        "layout_drawings": _layout_table([one for one in drawn if one["training"] == METHOD], "drawing", bounds),
        "layout_trainings": _layout_table([one for one in drawn if one["drawing"] == METHOD], "training", bounds),
    }


def _of_both(bounds: dict[str, Record], read: Callable[[Record], float]) -> str:
    return " and ".join(f"{100 * read(one):.0f}" for one in bounds.values())


def kept(record: Record, bounds: dict[str, Record]) -> float:
    """Where a layout lies between chance (0) and the most that the judge of silhouettes can tell (1)."""
    own = bounds[record["concept_name"]]
    low, high = own["chance"]["layout"]["mean"], own["judge"]["layout"]["mean"]
    return (record["layout"]["mean"] - low) / (high - low)


def _layout_table(records: Sequence[Record], by: str, bounds: dict[str, Record]) -> str:
    heads = (by, *(f"layout %, {name}" for name in bounds), "kept %", "small objects %", "large %", "growth of small",
             "likeness %", "object %", "context %")  # fmt: skip
    rows = []
    for name in dict.fromkeys(record[by] for record in records):
        group = {record["concept_name"]: record for record in records if record[by] == name}
        found = list(group.values())
        cells = [_interval(group[concept]["layout"]) if concept in group else "not measured" for concept in bounds]
        cells.append(f"{100 * mean(found, lambda one: kept(one, bounds)):.0f}")
        cells += [f"{100 * mean(found, lambda one, h=half: one[h]['layout']):.0f}" for half in ("small", "large")]
        cells.append(f"{mean(found, lambda one: one['small']['growth']):.2f}")
        rows.append([name, *cells, *(percent(found, share) for share in _SHARES)])
    return table(heads, rows)


def _interval(found: Record) -> str:
    low, high = (round(100 * one) for one in found["interval"])
    return f"{100 * found['mean']:.0f} ({low} to {high})"


def _mass_table(bounds: Sequence[Record]) -> str:
    rows = []
    for side in bounds[0]["map_mass"]:
        found = [one["map_mass"][side] for one in bounds]
        wanted = [(half, name) for half in ("small", "large") for name in ("mass", "area")]
        cells = [f"{100 * mean(found, lambda one, h=half, n=name: one[h][n]):.0f}" for half, name in wanted]
        rows.append([f"{side} x {side}", *cells])
    heads = ("layers of", "map on small objects %", "their area %", "map on large objects %", "their area %")
    return table(heads, rows)


def draw_layout(path: Path, to: Path) -> None:
    """Layout over likeness, a dot per intervention and concept, between chance and what the judge can tell."""
    import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

    records = json.loads(path.read_text())["layout"]
    bounds = {one["concept_name"]: one for one in records if one["training"] == "bounds"}
    figure, axes = plt.subplots(1, len(bounds), figsize=(6.5 * len(bounds), 5.4), layout="constrained", squeeze=False)
    for axis, (concept, bound) in zip(axes[0], bounds.items(), strict=True):
        own = [one for one in records if one["concept_name"] == concept and one["training"] != "bounds"]
        line = [one for one in own if one["training"] == METHOD and one["drawing"].startswith(("strength", METHOD))]
        usual = next(zip(*_points([one for one in line if one["drawing"] == METHOD]), strict=True))
        line.sort(key=lambda one: one["likeness"]["mean"])
        axis.plot(*_points(line), color="0.6", zorder=1)
        kinds = [
            ("other drawing", "o", [one for one in own if one["training"] == METHOD and one not in line]),
            ("other training", "s", [one for one in own if one["training"] != METHOD]),
            ("the method, at three strengths", "D", line),
        ]
        for (label, marker, group), colour in zip(kinds, ("C0", "C1", "0.3"), strict=True):
            axis.scatter(*_points(group), marker=marker, color=colour, label=label, zorder=2)
            for one, x, y in zip(group, *_points(group), strict=True):
                text = one["drawing"] if one["training"] == METHOD else one["training"]
                is_apart = max(abs(x - usual[0]), abs(y - usual[1])) > _APART
                if text in _LABELLED or (one["training"] != METHOD and is_apart):
                    axis.annotate(text, (x, y), fontsize=7, xytext=(5, 2), textcoords="offset points")
        for name, level in (("chance", bound["chance"]), ("the most that the judge can tell", bound["judge"])):
            axis.axhline(level["layout"]["mean"], color="0.7", linestyle="--", zorder=0)
            axis.text(0.0, level["layout"]["mean"] + 0.004, name, fontsize=8, color="0.4")
        axis.set_xlim(-0.02, 0.9)
        axis.set_ylim(0.42, 0.92)
        axis.set_title(concept)
        axis.set_xlabel("likeness to the concept")
        axis.set_ylabel("overlap with the foundation's silhouette")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=9, loc="upper right")
    figure.savefig(to, dpi=90)
    plt.close(figure)


def _points(records: Sequence[Record]) -> tuple[list[float], list[float]]:
    return [one["likeness"]["mean"] for one in records], [one["layout"]["mean"] for one in records]


def sweep_parts(path: Path) -> dict[str, str]:
    """What the template says of ``sweeps``' result."""
    result = json.loads(path.read_text())
    settings, records = result["settings"], result["sweeps"]
    named = {
        "strength": "strength",
        "guidance": "guidance",
        "lambda": "lambda (fraction {fraction:g})",
        "fraction": "fraction (lambda 1)",
        "ablation": "left out (lambda 1, fraction {fraction:g})",
        "scheme": "M, L, S",
    }
    parts = {f"sweep_{name}": _sweep_table(records, name, head.format(**settings)) for name, head in named.items()}
    return parts | {
        "sweeps_file": path.name,
        "sweeps_machine": machine_line(result),
        "sweeps_concepts": " and ".join(dict.fromkeys(one["concept_name"] for one in records)),
        "sweeps_infusion": ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in settings["infusion"].items()),
        "sweeps_ico": ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in settings["ico"].items()),
        "sweep_sampler": _sampler_table(records),
    }


def _sweep_table(records: Sequence[Record], sweep: str, head: str) -> str:
    rows = []
    own = [record for record in records if record["sweep"] == sweep]
    for value in dict.fromkeys(_word(record["value"]) for record in own):
        group = [record for record in own if _word(record["value"]) == value]
        shares = ("likeness", "concept", "object", "context", "layout")
        rows.append([value, *(percent_within(group, name) for name in shares)])
    return table((head, "likeness %", "seen %", "object %", "context %", "layout %"), rows)


def _word(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return value if isinstance(value, str) else f"{value:g}"


def _sampler_table(records: Sequence[Record]) -> str:
    names = ("likeness", "object", "context", "layout")
    rows = []
    for record in records:
        if record["sweep"] != "sampler":
            continue
        cells = []
        for name in names:
            ours, default = (100 * one["mean"] for one in record["both"][name])
            low, high = (round(100 * end) for end in record["difference"][name]["interval"])
            cells.append(f"{ours:.0f}, {default:.0f} ({low:+d} to {high:+d})")
        rows.append([record["concept_name"], record["value"], *cells])
    return table(("concept", "model", *(f"{name} %" for name in names)), rows)


def draw_sweeps(path: Path, to: Path) -> None:
    """What strength, lambda and fraction do, means over concepts."""
    import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

    records = json.loads(path.read_text())["sweeps"]
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained", sharey=True)
    titles = {"strength": "Infusion: strength", "lambda": "DCI: lambda", "fraction": "DCI: fraction of the steps"}
    for axis, (sweep, title) in zip(axes, titles.items(), strict=True):
        own = [record for record in records if record["sweep"] == sweep]
        values = sorted({record["value"] for record in own})
        for name, marker in zip(("likeness", "object", "context", "layout"), "osv^", strict=True):
            groups = [[record for record in own if record["value"] == value] for value in values]
            axis.plot(
                values, [mean(group, lambda one, n=name: one[n]["mean"]) for group in groups], marker=marker, label=name
            )
        axis.set_title(title)
        axis.set_ylim(-0.02, 1.02)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=9)
    figure.savefig(to, dpi=90)
    plt.close(figure)
