"""Turn result files into the README's tables: ``python -m benchmarks.report [--check]``.

The tables stand between ``<!-- results -->`` and ``<!-- /results -->``; ``--check`` only tells if they are current.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS
from benchmarks.tinyworld.evaluate import interval

README = Path(__file__).parent.parent / "README.md"
_GPU_TARGETS: dict[str, tuple[float, ...]] = {  # floor, must and goal, where there are any
    "guided_step": (2.03, 5.3, 3.7),
    "infusion_parallel_1": (3.98, 10.0, 6.8),
    "infusion_shared": (2.96, 7.8, 5.1),
    "infusion_parallel_8_per_concept": (2.21, 5.6, 3.8),
    "dci_average": (2.34, 6.1, 4.15),
    "vae_decode": (3.2, 8.0, 5.5),
    "generate_50": (0.0, 0.0, 0.0),
    "cold_start": (0.0, 0.0, 0.0),
    "concept_switch": (0.0, 0.0, 0.0),
}
Rows = dict[tuple[str, str, int], dict[str, dict[str, Any]]]  # records by case, dtype and rows, and by system
_SECTION = re.compile(r"(?<=<!-- results -->\n).*?(?=<!-- /results -->)", re.DOTALL)


def tables() -> str:
    """Markdown of every result file, newest first within a machine."""
    parts = []
    results = {path: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    for path, result in results.items():
        kinds = {"records": _speed, "results": _quality, "infusion": _infusion, "dci": _dci}
        parts.append(next(show(path, result) for name, show in kinds.items() if name in result))
    return "\n".join([gpu_targets([result for result in results.values() if "records" in result]), *parts])


def gpu_targets(results: list[dict[str, Any]]) -> str:
    """What a GPU is to reach, and what one has, in the newest file that has it."""
    measured: dict[str, float] = {}
    for result in results:
        if result["machine"].get("device", "cpu") != "cpu":
            for record in result["records"]:
                if record["system"] == "twinstream" and record["dtype"] == "float16":
                    measured.setdefault(record["case"], record["median_ms"])
    lines = [
        "On an H200, float16, 512x512, in ms; floors from the machine's products and copies. `make bench-gpu` measures "
        "all of it, and the rest of the suite, in under nine minutes.\n",
        "| case | floor | must | goal | measured |",
        "| --- | --- | --- | --- | --- |",
    ]
    for case, targets in _GPU_TARGETS.items():
        found = f"{measured[case]:.2f}" if case in measured else "not measured"
        lines.append(f"| {case} | {' | '.join(f'{one:g}' if one else '' for one in targets)} | {found} |")
    return "\n".join(lines) + "\n"


def _speed(path: Path, result: dict[str, Any]) -> str:
    about = result["machine"]
    rows: Rows = {}
    for record in result["records"]:
        rows.setdefault((record["case"], record["dtype"], record["rows"]), {})[record["system"]] = record
    is_gpu = about.get("device", "cpu") != "cpu"
    where = about["device"] if is_gpu else f"{about['cpu']} ({about['cpu_flags']}), {about['threads']} threads"
    lines = [
        f"{where}, torch {about['versions']['torch']}, "
        f"diffusers {about['versions']['diffusers']}, commit {about['commit'][:9]} "
        f"([{path.name}](benchmarks/results/{path.name})); median ms (p10 to p90), "
        "relative error against diffusers in float32, peak memory of a process of its own; diffusers eager, and "
        "through torch.compile (inductor):\n",
        "| case | dtype | rows | twinstream | diffusers | ratio | torch.compile | error (diffusers') "
        "| GB (diffusers') |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (case, dtype, n_rows), systems in rows.items():
        if "diffusers_eager" not in systems or "twinstream" not in systems:
            continue
        ours, theirs, compiled = systems["twinstream"], systems["diffusers_eager"], systems.get("diffusers_compile")
        ratio = theirs["median_ms"] / ours["median_ms"]
        memory = [record["peak_memory_bytes"] for record in (ours, theirs)]
        memory = "" if None in memory else f"{memory[0] / 1e9:.1f} ({memory[1] / 1e9:.1f})"
        errors = [record["rel_error"] for record in (ours, theirs)]
        error = "" if None in errors else f"{errors[0]:.1e} ({errors[1]:.1e})"
        lines.append(
            f"| {case} | {dtype} | {n_rows} | {_time(ours)} | {_time(theirs)} | {ratio:.2f}x | "
            f"{_time(compiled) if compiled else ''} | {error} | {memory} |"
        )
    return "\n".join(lines) + "\n" + _ops(rows)


def _ops(rows: Rows) -> str:
    """Single ops: what they reach, and which share that is of the machine's fastest product or copy."""
    lines = [
        "\nSingle ops, two rows at SD v1.5's sizes, beside the machine's ceilings in the same run (a large product, "
        "a copy):\n",
        "| op | dtype | twinstream | eager torch | ratio | reached | share of ceiling | error (torch's) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    found = [(key, systems) for key, systems in rows.items() if "torch_eager" in systems]
    for (case, dtype, _), systems in found:
        ours, theirs = systems["twinstream"], systems["torch_eager"]
        ceiling = rows["product" if "flops" in ours else "copy", dtype, 1]["ceiling"]
        (rate, unit), (most, _) = _rate(ours), _rate(ceiling)
        lines.append(
            f"| {case} | {dtype} | {_time(ours)} | {_time(theirs)} | {theirs['median_ms'] / ours['median_ms']:.2f}x | "
            f"{rate:.0f} {unit} | {100 * rate / most:.0f} % of {most:.0f} | "
            f"{ours['rel_error']:.1e} ({theirs['rel_error']:.1e}) |"
        )
    return "\n".join(lines) + "\n" if found else ""


def _rate(record: dict[str, Any]) -> tuple[float, str]:
    work, unit = (record["flops"], "GFLOP/s") if "flops" in record else (record["bytes"], "GB/s")
    return work / record["median_ms"] / 1e6, unit


def _time(record: dict[str, Any]) -> str:
    return f"{record['median_ms']:.1f} ({record['p10_ms']:.1f} to {record['p90_ms']:.1f})"


def _quality(path: Path, result: dict[str, Any]) -> str:
    about, settings, results = result["machine"], result["settings"], result["results"]
    columns = ("generated", "reconstructed", "drawn", "held_out")
    lines = [
        f"{settings['model']}: {settings['prompts']} fresh prompts, {settings['sampler']} {settings['steps']} steps, "
        f"guidance {settings['guidance_scale']:g}, commit {about['commit'][:9]} "
        f"([{path.name}](benchmarks/results/{path.name})); right by the classifier, %, with 95 % intervals. Beside it "
        "the classifier on drawings of the same scenes, through the VAE and as they are, and on 2,000 others. "
        f"VAE reconstruction: {results['vae_psnr_db']:.1f} dB PSNR.\n",
        "| right | generated | drawn, through the VAE | drawn | 2,000 held-out drawings |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in ("object", "colour", "background", "style"):
        cells = []
        for column in columns:
            found = results[column][name]
            low, high = found["interval"]
            cells.append(f"{100 * found['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _infusion(path: Path, result: dict[str, Any]) -> str:
    parts = []
    for name, settings in result["settings"].items():
        records = [record for record in result["infusion"] if record["settings"] == name]
        lines = [
            f"Infusion on tinyworld, {_set(name, settings)}; {_trained(settings)}; then {_drawn(path, settings)}; % "
            "with 95 % intervals, the foundation's own pictures in brackets. Judges are trained on drawings; beside "
            "stands how often they are right: the concept's on other drawings, the object's on the concept's own "
            "through the VAE (in brackets the evaluator, which never saw patterns and here tells backgrounds only).\n",
            "| concept | space | foundation | concept seen | background right | object right "
            "| concept's judge | object's judge | trained in |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        base: dict[str, dict[str, Any]] = {}
        for record in records:
            base |= {record["concept"]: record["foundation_pictures"]} if "foundation_pictures" in record else {}
            cells = []
            for what in ("concept", "background", "object"):
                plain = 100 * base[record["concept"]][what]["share"]
                cells.append(f"{_share(record['customised'][what])} [{plain:.0f}]")
            judges = (record["object_judge_accuracy"], record["evaluator_accuracy_on_concept"])
            own, old = (100 * judge["concept_through_vae"] for judge in judges)
            lines.append(
                f"| {record['concept']} | {record['space']} | {record['foundation']} | {' | '.join(cells)} | "
                f"{100 * record['judge_accuracy']:.1f} | {own:.0f} [{old:.0f}] | {record['training_seconds']:.0f} s |"
            )
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _dci(path: Path, result: dict[str, Any]) -> str:
    parts = []
    for name, settings in result["settings"].items():
        records = [record for record in result["dci"] if record["settings"] == name]
        seconds = [record["training_seconds"] for record in records]
        concepts = ", ".join(f"{one['concept']} (beside {one['auxiliary_noun']})" for one in records)
        strength, fraction = (settings["dci"][what] for what in ("strength", "fraction"))
        lines = [
            f"ICO and DCI on tinyworld, {_set(name, settings)}; {concepts}; {_trained(settings)} "
            f"({min(seconds):.0f} to {max(seconds):.0f} s); then of each {_drawn(path, settings)}; strength "
            f"{strength:g} and fraction {fraction:g} where they do not vary; % with 95 % intervals.\n",
            "| drawn with | concept seen | background right | object right |",
            "| --- | --- | --- | --- |",
            f"| ICO alone | {_pooled([record['ico'] for record in records])} |",
        ]
        for sweep in ("strength", "fraction", "ablation"):
            for i, entry in enumerate(records[0][sweep]):
                value = entry["value"] if sweep == "ablation" else f"{sweep} {entry['value']:g}"
                lines.append(f"| DCI, {value} | {_pooled([record[sweep][i] for record in records])} |")
        parts.append("\n".join([*lines, *_gates_and_file(records[0])]) + "\n")
    return "\n".join(parts)


def _gates_and_file(record: dict[str, Any]) -> list[str]:
    """How the concept's weight spreads over positions, and what its file costs."""
    lines = [
        "",
        f"The concept's weight w at each scale, over all steps and heads of one picture of {record['concept']}: "
        "1st percentile, median, 99th.\n",
        "| positions | calibrated | as printed |",
        "| --- | --- | --- |",
    ]
    for rows in zip(record["spread"]["calibrated"], record["spread"]["paper"], strict=True):
        cells = [f"{row['p1']:.4f}, {row['median']:.4f}, {row['p99']:.4f}" for row in rows]
        lines.append(f"| {rows[0]['positions']} | {' | '.join(cells)} |")
    lines += ["", f"The file of {record['concept']}:\n", "| rank | bytes | relative error |", "| --- | --- | --- |"]
    for row in record["compression"]:
        lines.append(f"| {row['rank'] or 'whole'} | {row['bytes']:,} | {row['error']:.3f} |")
    return lines


def _set(name: str, settings: dict[str, Any]) -> str:
    """A set of settings in words: its name, and whatever of it differs from the library's defaults."""
    changes = [
        f"{section}'s {setting} {_value(value)}"
        for section, values in settings["changed"].items()
        for setting, value in values.items()
    ]
    return f"**{name}**: {', '.join(changes) if changes else 'every setting as the library has it'}"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return f"({', '.join(f'{one} for {key}' for key, one in value.items())})"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _trained(settings: dict[str, Any]) -> str:
    training = settings["training"]
    n_pictures = training["batch_size"] * training["accumulation_steps"]
    rate = f"learning rate {training['learning_rate']:g}"
    if "context_learning_rate" in training:
        rate += f" (of contexts {training['context_learning_rate']:g})"
    return f"5 reference pictures in 2 contexts, {training['steps']} steps of {n_pictures} pictures, {rate}"


def _drawn(path: Path, settings: dict[str, Any]) -> str:
    drawing = settings["drawing"]
    return (
        f"{settings['seeds']} pictures in each of {settings['contexts']} contexts, {drawing['sampler']} "
        f"{drawing['steps']} steps, guidance {drawing['guidance_scale']:g}, commit {settings['commit'][:9]} "
        f"([{path.name}](benchmarks/results/{path.name}))"
    )


def _share(measured: dict[str, Any]) -> str:
    low, high = measured["interval"]
    return f"{100 * measured['share']:.0f} ({100 * low:.0f} to {100 * high:.0f})"


def pooled(measured: list[dict[str, Any]], what: str) -> tuple[float, float, float]:
    """The share that is right over all concepts, and its 95 % interval."""
    counts = [(round(one[what]["share"] * one[what]["n"]), one[what]["n"]) for one in measured]
    right, n = (sum(column) for column in zip(*counts, strict=True))
    return right / n, *interval([True] * right + [False] * (n - right))


def _pooled(measured: list[dict[str, Any]]) -> str:
    """Concept, background and object over all concepts."""
    shares = [pooled(measured, what) for what in ("concept", "background", "object")]
    return " | ".join(_share({"share": share, "interval": (low, high)}) for share, low, high in shares)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    text = README.read_text()
    current = _SECTION.sub(lambda _: tables(), text)
    if arguments.check:
        return int(current != text)
    README.write_text(current)
    return 0


if __name__ == "__main__":
    sys.exit(main())
