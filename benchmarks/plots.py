"""Draw the charts in ``docs/`` from result files: ``python -m benchmarks.plots`` (needs the ``plots`` extra)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]
import numpy as np

from benchmarks.machine import RESULTS
from benchmarks.report import METHODS, pooled

DOCS = Path(__file__).parent.parent / "docs"
_SWEEPS = {"strength": "strength of the other branch", "fraction": "fraction of the steps that mix"}
_KINDS = {"concept": "the concept is seen", "background": "the background is right", "object": "the object is right"}
_FONT_PT = 11


def dci_curves(result: dict[str, Any]) -> None:
    """How often concept, background and object are right over strengths and fractions, with 95 % intervals."""
    names = list(result["settings"])
    size = (11, 3.9 * len(names) + 0.5)
    figure, axes = plt.subplots(
        len(names), len(_SWEEPS), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    figure.suptitle(
        "DCI on tinyworld: share of pictures in which each is so, with 95 % intervals", fontsize=_FONT_PT + 2
    )
    for row, name in zip(axes, names, strict=True):
        settings = result["settings"][name]
        records = [record for record in result["dci"] if record["settings"] == name]
        concepts = (
            " and ".join(record["concept"] for record in records) if len(records) < 3 else f"{len(records)} concepts"
        )
        others = {"strength": "fraction", "fraction": "strength"}
        for axis, (sweep, label) in zip(row, _SWEEPS.items(), strict=True):
            values = [entry["value"] for entry in records[0][sweep]]
            for i, (what, told) in enumerate(_KINDS.items()):
                if not all(what in record[sweep][0] for record in records):
                    continue  # not measured in this set
                found = [pooled([record[sweep][at] for record in records], what) for at in range(len(values))]
                shares, lows, highs = 100 * np.array(found).T
                places = np.array(values) + (i - 1) * 0.008 * (max(values) - min(values))  # intervals side by side
                errors = (shares - lows, highs - shares)
                axis.errorbar(places, shares, yerr=errors, marker="os^"[i], capsize=3, label=told)
            fixed = f"{others[sweep]} {settings['dci'][others[sweep]]:g}"
            guidance = f"guidance {settings['drawing']['guidance_scale']:g}"
            axis.set_title(f"settings: {name}; {concepts}\n{fixed}, {guidance}", fontsize=_FONT_PT)
            axis.set_xlabel(label, fontsize=_FONT_PT)
            axis.set_xticks(values)
            axis.set_ylim(-3, 103)
            axis.tick_params(labelsize=_FONT_PT)
            axis.grid(alpha=0.3)
        row[0].set_ylabel("% of pictures", fontsize=_FONT_PT)
    axes[0][0].legend(fontsize=_FONT_PT)
    figure.savefig(DOCS / "dci-curves.png", dpi=110)


def speed(results: list[dict[str, Any]], file: str) -> None:
    """How many times as fast as eager diffusers each case is, by dtype."""
    records = [record for result in results for record in result["records"]]
    times = {(r["case"], r["rows"], r["dtype"], r["system"]): r["median_ms"] for r in records}
    compared = [key[:3] for key in times if key[3] == "diffusers_eager" and (*key[:3], "twinstream") in times]
    cases = list(dict.fromkeys((case, rows) for case, rows, _ in compared))
    dtypes = sorted({dtype for _, _, dtype in compared}, reverse=True)
    figure, axis = plt.subplots(figsize=(9, 0.62 * len(cases) + 1.2), layout="constrained")
    height = 0.8 / len(dtypes)
    for i, dtype in enumerate(dtypes):
        own = [(at, (*case, dtype)) for at, case in enumerate(cases) if (*case, dtype) in compared]
        places = [at + (i - (len(dtypes) - 1) / 2) * height for at, _ in own]
        ratios = [times[(*key, "diffusers_eager")] / times[(*key, "twinstream")] for _, key in own]
        bars = axis.barh(places, ratios, height=0.95 * height, label=dtype)
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=11)
    axis.axvline(1.0, color="black", linewidth=0.8)
    names = [f"{case}, {rows} rows{' *' * case.startswith(METHODS)}" for case, rows in cases]
    axis.set_yticks(range(len(cases)), names, fontsize=11)
    axis.invert_yaxis()
    axis.margins(x=0.08)
    figure.supxlabel(
        "times as fast as eager diffusers, same machine and run\n"
        "* as our map-writing processor on diffusers' modules, one concept at a time",
        fontsize=12,
    )
    axis.legend(fontsize=12)
    figure.savefig(DOCS / file, dpi=110)


def main() -> None:
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    for result in results:
        if "dci" in result:
            dci_curves(result)
    timed = [result for result in results if "records" in result]
    on_gpu = [result for result in timed if result["machine"].get("device", "cpu") != "cpu"]
    speed([result for result in timed if result not in on_gpu], "speed.png")
    if on_gpu:
        speed(on_gpu, "speed-gpu.png")


if __name__ == "__main__":
    main()
