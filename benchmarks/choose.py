"""Print the table of ``kernels/choice.py`` from a GPU's result file: ``python -m benchmarks.choose FILE``.

A kernel of ours is chosen where its slowest tenth is faster than torch's median, in the run that has both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

_CHOSEN = ("attention", "layer_norm_linear", "layer_norm_geglu", "linear_add")


def faster(records: list[dict[str, Any]]) -> dict[str, list[tuple[int, ...]]]:
    """By op, the sizes at which ours wins over all that would serve without it."""
    rows: dict[tuple[str, tuple[int, ...]], dict[str, dict[str, Any]]] = {}
    for record in records:
        if record.get("op") in _CHOSEN:
            rows.setdefault((record["op"], tuple(record["sizes"])), {})[record["system"]] = record
    table: dict[str, list[tuple[int, ...]]] = {}
    for (op, sizes), systems in rows.items():
        ours = systems.pop("twinstream")
        if ours["p90_ms"] < min(other["median_ms"] for other in systems.values()):
            table.setdefault(op, []).append(sizes)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    result = json.loads(parser.parse_args().file.read_text())
    capability = result["machine"]["compute_capability"]
    print("FASTER: dict[tuple[str, int], frozenset[tuple[int, ...]]] = {")
    for op, sizes in sorted(faster(result["records"]).items()):
        print(f'    ("{op}", {capability}): frozenset({{{", ".join(map(str, sorted(sizes)))}}}),')
    print("}")


if __name__ == "__main__":
    main()
