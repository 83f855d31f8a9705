"""Draw the charts in ``docs/`` from result files: ``python -m benchmarks.plots`` (needs the ``plots`` extra)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]
import numpy as np

from benchmarks.machine import RESULTS
from benchmarks.report import pooled

DOCS = Path(__file__).parent.parent / "docs"
_SWEEPS = ("strength", "fraction")
_KINDS = {"concept": "concept seen", "background": "background right"}


def dci_curves(result: dict[str, Any]) -> None:
    """How often concept and background are right over strengths and fractions, with 95 % intervals."""
    records = result["dci"]
    figure, axes = plt.subplots(1, len(_SWEEPS), figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, sweep in zip(axes, _SWEEPS, strict=True):
        values = [entry["value"] for entry in records[0][sweep]]
        for what, label in _KINDS.items():
            found = [pooled([record[sweep][i] for record in records], what) for i in range(len(values))]
            shares, lows, highs = 100 * np.array(found).T
            axis.errorbar(values, shares, yerr=(shares - lows, highs - shares), marker="o", capsize=3, label=label)
        axis.set_xlabel(sweep)
        axis.set_xticks(values)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("% of pictures")
    axes[0].legend()
    figure.savefig(DOCS / "dci-curves.png", dpi=110)


def speed(results: list[dict[str, Any]]) -> None:
    """How many times as fast as eager diffusers each case is, by dtype."""
    records = [record for result in results for record in result["records"]]
    times = {(r["case"], r["dtype"], r["system"]): r["median_ms"] for r in records}
    cases = list(dict.fromkeys(case for case, _, system in times if system == "diffusers_eager"))
    figure, axis = plt.subplots(figsize=(9, 0.42 * len(cases) + 1), layout="constrained")
    for offset, dtype in ((-0.2, "float32"), (0.2, "bfloat16")):
        ratios = [times[case, dtype, "diffusers_eager"] / times[case, dtype, "twinstream"] for case in cases]
        bars = axis.barh([i + offset for i in range(len(cases))], ratios, height=0.38, label=dtype)
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(cases)), cases)
    axis.invert_yaxis()
    axis.set_xlabel("times as fast as eager diffusers, same machine and run")
    axis.legend()
    figure.savefig(DOCS / "speed.png", dpi=110)


def main() -> None:
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    for result in results:
        if "dci" in result:
            dci_curves(result)
    speed([result for result in results if "records" in result])


if __name__ == "__main__":
    main()
