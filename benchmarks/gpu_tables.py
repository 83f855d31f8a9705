"""The tables of docs/performance.md that are of GPUs: targets and times, and what ``benchmarks.sass`` found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Results = dict[Path, dict[str, Any]]
_TARGETS: dict[str, tuple[float, ...]] = {  # floor, must and goal, where there are any
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


_TELLING = ("D", "GROUP", "GATED", "TMA", "PARTIAL", "BLOCK_M", "BLOCK_N", "BLOCK_K")


def is_gpu(result: dict[str, Any]) -> bool:
    """Whether a result file was measured on one."""
    return result["machine"].get("device", "cpu") != "cpu"


def targets(results: Results) -> str:
    """What a GPU is to reach, what its kernels' code predicts, and what one has, in the newest file that has it."""
    measured: dict[tuple[str, str], float] = {}
    for result in results.values():
        if "records" in result and is_gpu(result):
            for record in result["records"]:
                if record["dtype"] == "float16":
                    measured.setdefault((record["case"], record["system"]), record["median_ms"])
    predicted = predictions(results)
    lines = [
        "Targets on an H200, float16, 512x512, in ms a step or a picture; floors are computed from the model's work "
        "and the card's fastest products and copies. Predictions are read from machine code, as below; how far off "
        "they are is unknown until measured.\n",
        '| case | floor | must | goal | predicted | measured | measured, backend="auto" |',
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case, goals in _TARGETS.items():
        known = f"{predicted[case]:.2f}" if case in predicted else ""
        found = [measured.get((case, system)) for system in ("twinstream", "twinstream_auto")]
        cells = ["not measured" if one is None else f"{one:.2f}" for one in found]
        reach = " | ".join(f"{one:g}" if one else "" for one in goals)
        lines.append(f"| {case} | {reach} | {known} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def newest(results: Results) -> tuple[Path, dict[str, Any]] | None:
    """The file of the newest Triton, and what is in it."""
    found = [(path, result["sass"]) for path, result in results.items() if "sass" in result]
    return max(found, key=lambda one: tuple(int(part) for part in one[1]["triton"].split(".")[:2]), default=None)


def predictions(results: Results) -> dict[str, float]:
    """Milliseconds by case, of the newest file."""
    found = newest(results)
    if found is None:
        return {}
    steps = {name: step["predicted_ms"] for name, step in found[1]["steps"].items()}
    return steps | {"dci_average": found[1]["dci_average_ms"]}


def machine_code(results: Results) -> str:
    """A step by kinds of kernels, in every file, and the newest one's kernels."""
    found = newest(results)
    if found is None:
        return "`python -m benchmarks.sass` was not run.\n"
    path, sass = found
    card, kinds = sass["card"], sass["steps"]["guided_step"]["kernels"]
    lines = [
        f"A guided step (2 rows, 512x512, {sass['dtype']}) on an H200, predicted, its error unknown until measured: "
        f"products at {card['flops'] / 1e12:g} TFLOP/s and copies at {card['n_bytes'] / 1e12:g} TB/s, as measured; "
        f"cuDNN's and cuBLAS' at {100 * card['library_share']:g} % of that and {1e6 * card['gap_seconds']:g} us from "
        "one kernel to the next in a graph, as assumed.\n",
        f"| | {' | '.join(kinds)} | gaps | sum |",
        f"| --- |{' --- |' * (len(kinds) + 2)}",
        f"| kernels | {' | '.join(map(str, kinds.values()))} | | {sum(kinds.values())} |",
    ]
    for result in results.values():
        if "sass" in result:
            step = result["sass"]["steps"]["guided_step"]
            times = [f"{one:.2f}" for one in (*step["ms"].values(), step["gaps_ms"], step["predicted_ms"])]
            lines.append(f"| ms, Triton {result['sass']['triton']} | {' | '.join(times)} |")
    lines += [
        "",
        f"Its kernels as Triton {sass['triton']} compiles them for sm_90 "
        f"([{path.name}](benchmarks/results/{path.name})). A program's FLOPs and bytes are of the launch that takes "
        "longest, whole tiles and all that is loaded and stored; the loop is the one with most products.\n",
        "| kernel | launches | registers (80, 86, 89) | shared KB (80, 86, 89) | most stack bytes | in the loop: "
        "instructions, HGMMA, HMMA, MUFU | rounds | MFLOP a program | KB a program | held back by | us a step |",
        f"|{' --- |' * 11}",
    ]
    return "\n".join([*lines, *map(_kernel, sass["kernels"])]) + "\n"


def _kernel(row: dict[str, Any]) -> str:
    usage, loop = row["usage"], row["loop"]
    own, others = usage["90"], [usage[one] for one in ("80", "86", "89") if one in usage]
    registers = ", ".join(str(one["registers"]) for one in others)
    shared = ", ".join(f"{one['shared_bytes'] / 1024:.0f}" for one in others)
    spills = max(one["stack_bytes"] for one in usage.values())
    held = max(row["bounds_us"], key=lambda name: row["bounds_us"][name])
    cells = [
        f"{row['kernel'].strip('_').removesuffix('_kernel').removesuffix('_fwd')} {_told(row['constants'])}".strip(),
        str(row["launches"]),
        f"{own['registers']} ({registers})",
        f"{own['shared_bytes'] / 1024:.0f} ({shared})",
        str(spills),
        ", ".join(str(loop[name]) for name in ("loop_instructions", "hgmma", "hmma", "mufu")),
        f"{row['trips']:g}",
        f"{row['tile_flops'] / 1e6:.1f}",
        f"{row['tile_bytes'] / 1024:.0f}",
        held,
        f"{row['step_us']:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _told(constants: str) -> str:
    """Those that tell configurations of a kernel apart."""
    words = dict(word.split("=") for word in constants.split())
    names = [name for name in words if name in _TELLING]
    return " ".join(f"{name}={words[name]}" for name in names)
