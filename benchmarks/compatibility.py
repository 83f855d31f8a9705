"""How nearly this engine agrees with other libraries: ``python -m benchmarks.compatibility`` writes the result file.

Every line is measured by tests: those of ``tests/parity`` that ask for the fixture ``agrees``, which asserts the bound
of an error and hands it over. Of several tests with one line the largest error is kept.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS

PROPERTY = "compatibility"
_LIBRARIES = ("torch", "diffusers", "peft", "lycoris-lora", "transformers")


class Collector:
    """A plugin of pytest: runs only tests that compare, and keeps what they found."""

    def __init__(self) -> None:
        self.errors: dict[tuple[str, str], list[float]] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if "agrees" in item.fixturenames]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call":
            for name, value in report.user_properties:
                if name == PROPERTY:
                    feature, against, error = value
                    self.errors.setdefault((feature, against), []).append(error)

    def lines(self) -> list[dict[str, Any]]:
        """One a feature and what it was compared with, in order of their names."""
        return [
            {"feature": feature, "against": against, "error": float(f"{max(errors):.1e}"), "comparisons": len(errors)}
            for (feature, against), errors in sorted(self.errors.items())
        ]


def show(_path: Path, result: dict[str, Any]) -> str:
    """The table in Markdown."""
    rows = [
        f"| {one['feature']} | {one['against']} | {one['error']:.1e} | {one['comparisons']} |"
        for one in result[PROPERTY]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    head = "| what | compared with | largest relative error | comparisons |\n| --- | --- | --- | --- |\n"
    return f"\n{head}" + "\n".join(rows) + f"\n\nIn float32 on a CPU, with {versions}.\n\n"


def main(arguments: Sequence[str] = ()) -> int:
    import pytest

    collector = Collector()
    status = pytest.main(["-q", "-W", "ignore", "-p", "no:cacheprovider", "tests/parity", *arguments], [collector])
    if status == 0:
        result = {PROPERTY: collector.lines(), "versions": {name: metadata.version(name) for name in _LIBRARIES}}
        path = RESULTS / "compatibility.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(path)
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
