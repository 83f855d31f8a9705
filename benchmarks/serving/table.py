"""What ``load.py`` measured, as tables for docs/serving.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def show(path: Path, result: dict[str, Any]) -> str:
    """Throughput and latency by system, a short request behind long ones, and the soak."""
    settings, machine = result["settings"], result["machine"]
    lines = [
        f"The embedded model, {settings['requests']} requests of {_listed(settings['steps'])} steps; {machine['cpu']}, "
        f"{machine['threads']} threads, torch {machine['versions']['torch']}, commit {machine['commit'][:9]}, "
        f"{machine['date']} ([{path.name}](benchmarks/results/{path.name})). Seconds from asking to the picture.",
        "",
        "| requests | how they come | who draws | pictures a second | p50 | p95 | p99 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in result["serving"]:
        loop = f"{settings['in_flight']} in flight" if one["loop"] == "closed" else f"Poisson, {one['loop'][6:]}"
        numbers = " | ".join(f"{one[name]:.2f}" for name in ("per_second", "p50", "p95", "p99"))
        lines.append(f"| {one['kinds']} | {loop} | {one['system']} | {numbers} |")
    lines += [
        "",
        "A request of 8 steps, alone and while requests of 50 steps come at half of what one by one can do (medians):",
        "",
        "| who draws | alone | behind long ones | ratio | worst |",
        "| --- | --- | --- | --- | --- |",
    ]
    for one in result["short_behind_long"]:
        numbers = f"{one['alone']:.2f} | {one['behind']:.2f} | {one['ratio']:.2f} | {one['worst']:.2f}"
        lines.append(f"| {one['system']} | {numbers} |")
    if "soak" in result:
        lines += ["", _soak(result["soak"])]
    return "\n".join(lines) + "\n"


def _soak(soak: dict[str, Any]) -> str:
    found = soak["outcomes"]
    return (
        f"A soak of {soak['minutes']:g} min at a load of 0.8, a tenth cancelled and a twentieth bad: of "
        f"{soak['submitted']} requests {found['drawn']} were drawn, {found['cancelled']} cancelled, {found['bad']} "
        f"refused as bad, {found['refused']} for a full queue, and of {found['wrong']} something else became; memory "
        f"changed by {100 * soak['memory_growth_last_half']:+.1f} % over the last half."
    )


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values[:-1])) + f" or {values[-1]}"
