"""Turn result files into the tables of the README and of ``docs/``: ``python -m benchmarks.report [--check]``.

A table stands between ``<!-- results:NAME -->`` and ``<!-- /results:NAME -->``, in whichever page has these marks;
``--check`` only tells if all are current.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import compatibility, gpu_tables
from benchmarks.gpu_tables import Results, is_gpu
from benchmarks.machine import RESULTS
from benchmarks.serving import table as serving_table
from benchmarks.tinyworld.evaluate import interval

ROOT = Path(__file__).parent.parent
PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "performance.md",
    ROOT / "docs" / "studies.md",
    ROOT / "docs" / "compatibility.md",
    ROOT / "docs" / "serving.md",
)
METHODS = ("infusion", "dci")  # cases whose peer is a processor of ours on diffusers' modules, not diffusers alone
_SUMMARY = {  # what the README shows: file's case, and its name there
    "guided_step_full_size": "guided step, 512x512",
    "vae_decode_full_size": "VAE decode, 512x512",
    "generate_20": "embedded model, 20 steps, 128x128",
}
Rows = dict[tuple[str, str, int], dict[str, dict[str, Any]]]  # records by case, dtype and rows, and by system
_SECTION = re.compile(r"(<!-- results:(\w+) -->\n).*?(?=<!-- /results:\2 -->)", re.DOTALL)


def tables() -> dict[str, str]:
    """Markdown of the result files by the name of their block; links are relative to the repository's root."""
    results = {path: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}

    def each(kind: str, show: Callable[[Path, dict[str, Any]], str]) -> str:
        return "\n".join(filter(None, (show(path, result) for path, result in results.items() if kind in result)))

    return {
        "summary": summary(results),
        "compatibility": each(compatibility.PROPERTY, compatibility.show),
        "speed": each("records", _speed),
        "methods": each("records", _methods),
        "ops": each("records", _ops),
        "gpu": gpu_tables.targets(results),
        "sass": gpu_tables.machine_code(results),
        "tinyworld": each("results", _quality),
        "infusion": each("infusion", _infusion),
        "dci": each("dci", _dci),
        "before_after": each("before_after", _before_after),
        "serving": each("serving", serving_table.show),
        "http": each("http", serving_table.show_http),
        "soak": each("soak", serving_table.show_soak),
    }


def summary(results: Results) -> str:
    """A few times of the newest CPU file that has them, in seconds, the unfavourable ones among them."""
    timed = [result for result in results.values() if "records" in result and not is_gpu(result)]
    timed.sort(key=lambda result: result["machine"].get("date", ""))
    found: dict[tuple[str, str], dict[str, float]] = {}
    for result in timed:
        found |= {
            (case, dtype): {system: record["median_ms"] / 1000 for system, record in systems.items()}
            for (case, dtype, _), systems in _rows(result).items()
            if case in _SUMMARY
        }
    lines = [
        "| seconds, CPU | dtype | twinstream | diffusers | torch.compile | OpenVINO |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case, name in _SUMMARY.items():
        for dtype in ("float32", "bfloat16"):
            times = found.get((case, dtype), {})
            systems = ("twinstream", "diffusers_eager", "diffusers_compile", "openvino")
            cells = [f"{times[system]:.2f}" if system in times else "not measured" for system in systems]
            lines.append(f"| {name} | {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _rows(result: dict[str, Any]) -> Rows:
    rows: Rows = {}
    for record in result["records"]:
        rows.setdefault((record["case"], record["dtype"], record["rows"]), {})[record["system"]] = record
    return rows


def _measured_on(path: Path, result: dict[str, Any]) -> str:
    about = result["machine"]
    cpu = f"{about.get('cpu')} ({about.get('cpu_flags')}), {about.get('threads')} threads"
    openvino = f", OpenVINO {about['versions']['openvino']}" if "openvino" in about["versions"] else ""
    return (
        f"{about['device'] if is_gpu(result) else cpu}, torch {about['versions']['torch']}, diffusers "
        f"{about['versions']['diffusers']}{openvino}, commit {about['commit'][:9]} "
        f"([{path.name}](benchmarks/results/{path.name}))"
    )


def _before_after(path: Path, result: dict[str, Any]) -> str:
    times = {(one["case"], one["dtype"], one["side"]): one["median_ms"] for one in result["before_after"]}
    lines = [
        f"Commit {result['before'][:9]} and {_measured_on(path, result)}; median ms.\n",
        "| case | dtype | before | after | ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    for case, dtype in dict.fromkeys((case, dtype) for case, dtype, _ in times):
        before, after = (times[case, dtype, side] for side in ("before", "after"))
        lines.append(f"| {case} | {dtype} | {before:,.0f} | {after:,.0f} | {before / after:.2f}x |")
    return "\n".join(lines) + "\n"


def _compared(result: dict[str, Any], of_methods: bool) -> list[tuple[tuple[str, str, int], dict[str, dict[str, Any]]]]:
    return [
        (key, systems)
        for key, systems in _rows(result).items()
        if {"diffusers_eager", "twinstream"} <= set(systems) and key[0].startswith(METHODS) == of_methods
    ]


def _speed(path: Path, result: dict[str, Any]) -> str:
    lines = [
        f"{_measured_on(path, result)}; median ms (p10 to p90):\n",
        "| case | dtype | rows | twinstream | diffusers | ratio | torch.compile | ratio | OpenVINO | ratio "
        "| error (diffusers', OpenVINO's) | GB (diffusers') |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (case, dtype, n_rows), systems in _compared(result, of_methods=False):
        ours, theirs = systems["twinstream"], systems["diffusers_eager"]
        others = [systems.get(name) for name in ("diffusers_compile", "openvino")]
        memory = [record["peak_memory_bytes"] for record in (ours, theirs)]
        memory = "" if None in memory else f"{memory[0] / 1e9:.1f} ({memory[1] / 1e9:.1f})"
        cells = [f"{_time(other)} | {_ratio(ours, other)}" if other else "not measured | " for other in others]
        errors = _errors(ours, theirs, *([others[1]] if others[1] else []))
        lines.append(
            f"| {case} | {dtype} | {n_rows} | {_time(ours)} | {_time(theirs)} | {_ratio(ours, theirs)} | "
            f"{' | '.join(cells)} | {errors} | {memory} |"
        )
    return "\n".join(lines) + "\n" if len(lines) > 3 else ""


def _methods(path: Path, result: dict[str, Any]) -> str:
    lines = [
        f"{_measured_on(path, result)}; median ms (p10 to p90):\n",
        "| case | dtype | our rows | twinstream | our map-writing processor on diffusers' modules, one concept at a "
        "time | ratio | error (the processor's) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (case, dtype, n_rows), systems in _compared(result, of_methods=True):
        ours, theirs = systems["twinstream"], systems["diffusers_eager"]
        lines.append(
            f"| {case} | {dtype} | {n_rows} | {_time(ours)} | {_time(theirs)} | {_ratio(ours, theirs)} | "
            f"{_errors(ours, theirs)} |"
        )
    return "\n".join(lines) + "\n" if len(lines) > 3 else ""


def _ops(path: Path, result: dict[str, Any]) -> str:
    """Single ops: what they reach, and which share that is of the machine's fastest product or copy."""
    lines = [
        f"{_measured_on(path, result)}; median ms (p10 to p90):\n",
        "| op | dtype | twinstream | eager torch | ratio | reached | share of ceiling | error (torch's) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = _rows(result)
    found = [(key, systems) for key, systems in rows.items() if "torch_eager" in systems]
    for (case, dtype, _), systems in found:
        ours, theirs = systems["twinstream"], systems["torch_eager"]
        ceiling = rows["product" if "flops" in ours else "copy", dtype, 1]["ceiling"]
        (rate, unit), (most, _) = _rate(ours), _rate(ceiling)
        lines.append(
            f"| {case} | {dtype} | {_time(ours)} | {_time(theirs)} | {_ratio(ours, theirs)} | "
            f"{rate:.0f} {unit} | {100 * rate / most:.0f} % of {most:.0f} | {_errors(ours, theirs)} |"
        )
    return "\n".join(lines) + "\n" if found else ""


def _rate(record: dict[str, Any]) -> tuple[float, str]:
    work, unit = (record["flops"], "GFLOP/s") if "flops" in record else (record["bytes"], "GB/s")
    return work / record["median_ms"] / 1e6, unit


def _time(record: dict[str, Any]) -> str:
    digits = 1 if record["median_ms"] < 1000 else 0
    median, low, high = (f"{record[name]:,.{digits}f}" for name in ("median_ms", "p10_ms", "p90_ms"))
    return f"{median} ({low} to {high})"


def _ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    return f"{theirs['median_ms'] / ours['median_ms']:.2f}x"


def _errors(ours: dict[str, Any], *theirs: dict[str, Any]) -> str:
    errors = [record["rel_error"] for record in (ours, *theirs)]
    return "" if None in errors else f"{errors[0]:.1e} ({', '.join(f'{error:.1e}' for error in errors[1:])})"


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
    cells = []
    for what in ("concept", "background", "object"):
        if all(what in one for one in measured):
            share, low, high = pooled(measured, what)
            cells.append(_share({"share": share, "interval": (low, high)}))
        else:
            cells.append("not measured")
    return " | ".join(cells)


def filled(page: Path) -> str:
    """The page's text with its blocks as the result files have them."""
    found, up = tables(), "" if page.parent == ROOT else "../"

    def fill(block: re.Match[str]) -> str:
        return block.group(1) + "\n" + found[block.group(2)].replace("](benchmarks/", f"]({up}benchmarks/") + "\n"

    return _SECTION.sub(fill, page.read_text())


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args(given)
    current = {page: filled(page) for page in PAGES}
    if arguments.check:
        return int(any(text != page.read_text() for page, text in current.items()))
    for page, text in current.items():
        page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
