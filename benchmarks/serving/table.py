"""What ``load.py`` measured, as tables for docs/serving.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def show(path: Path, result: dict[str, Any]) -> str:
    """Throughput and latency by system, a short request behind long ones, and the soak."""
    settings = result["settings"]
    lines = [
        f"The embedded model, {settings['requests']} requests of {_listed(settings['steps'])} steps; "
        f"{_measured_on(path, result)}. Seconds from asking to the picture.",
        "",
        "| requests | how they come | who draws | pictures a second | p50 | p95 | p99 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in result["serving"]:
        loop = f"{settings['in_flight']} in flight" if one["loop"] == "closed" else f"Poisson, {one['loop'][6:]}"
        lines.append(f"| {one['kinds']} | {loop} | {one['system']} | {_numbers(one)} |")
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
    return "\n".join(lines) + "\n"


def show_http(path: Path, result: dict[str, Any]) -> str:
    """Pictures a second and latencies by server and by how requests come."""
    settings = result["settings"]
    lines = [
        f"The embedded model, {settings['requests']} requests of {_listed(settings['steps'])} steps over HTTP; "
        f"{_measured_on(path, result)}. Seconds from asking to the PNG.",
        "",
        "| server | how they come | pictures a second | p50 | p95 | p99 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in result["http"]:
        way = f"{one['in_flight']} in flight" if "in_flight" in one else f"Poisson, {one['rate']:.2f} a second"
        lines.append(f"| {one['system']} | {way} | {_numbers(one)} |")
    return "\n".join(lines) + "\n"


def show_full_size(path: Path, result: dict[str, Any]) -> str:
    """What rows cost at SD v1.5's size, and what follows for requests that come at once."""
    found = result["serving_full_size"]
    rows = ", ".join(f"{seconds:.2f} for {n}" for n, seconds in found["step_seconds"].items())
    lines = [
        f"SD v1.5's size with random weights, 512x512, {found['dtype']}; {_measured_on(path, result)}. Seconds of a "
        f"step by its rows: {rows}. Pictures of {found['steps']} steps, all asked for at once:",
        "",
        "| who draws | requests | pictures a minute | p50 | p95 |",
        "| --- | --- | --- | --- | --- |",
    ]
    for one in found["serving"]:
        numbers = f"{60 * one['per_second']:.2f} | {one['p50']:.1f} | {one['p95']:.1f}"
        lines.append(f"| {one['system']} | {one['requests']} | {numbers} |")
    return "\n".join(lines) + "\n"


def show_soak(path: Path, result: dict[str, Any]) -> str:
    """What became of every request of a long run."""
    soak, found = result["soak"], result["soak"]["outcomes"]
    return (
        f"A soak of {soak['minutes']:g} min at a load of 0.8, a tenth cancelled and a twentieth bad: of "
        f"{soak['submitted']} requests {found['drawn']} were drawn, {found['cancelled']} cancelled, {found['bad']} "
        f"refused as bad, {found['refused']} for a full queue, and of {found['wrong']} something else became; memory "
        f"changed by {100 * soak['memory_growth_last_half']:+.1f} % over the last half; {_measured_on(path, result)}.\n"
    )


def _numbers(one: dict[str, Any]) -> str:
    """Pictures a second and latencies, as cells."""
    return " | ".join(f"{one[name]:.2f}" for name in ("per_second", "p50", "p95", "p99"))


def _measured_on(path: Path, result: dict[str, Any]) -> str:
    machine = result["machine"]
    return (
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['versions']['torch']}, commit "
        f"{machine['commit'][:9]}, {machine['date']} ([{path.name}](benchmarks/results/{path.name}))"
    )


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values[:-1])) + f" or {values[-1]}"
