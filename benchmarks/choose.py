"""Print the table of ``kernels/choice.py`` from a GPU's result file: ``python -m benchmarks.choose FILE``.

A kernel of ours is chosen where its slowest tenth is faster than torch's median, in the run that has both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def faster(records: list[dict[str, Any]]) -> dict[str, list[int]]:
    """By op, the widths at which ours wins."""
    rows: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for record in records:
        if "op" in record:
            rows.setdefault((record["op"], record["width"]), {})[record["system"]] = record
    table: dict[str, list[int]] = {}
    for (op, width), systems in rows.items():
        if systems["twinstream"]["p90_ms"] < systems["torch_eager"]["median_ms"]:
            table.setdefault(op, []).append(width)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    result = json.loads(parser.parse_args().file.read_text())
    capability = result["machine"]["compute_capability"]
    print("FASTER: dict[tuple[str, int], frozenset[int]] = {")
    for op, widths in sorted(faster(result["records"]).items()):
        print(f'    ("{op}", {capability}): frozenset({{{", ".join(map(str, sorted(widths)))}}}),')
    print("}")


if __name__ == "__main__":
    main()
