"""Options and fixtures of the benchmarks: where records go, and what the GPU's are tried out on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Keep = Callable[[list[dict[str, Any]]], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--records", type=Path, help="append the records to this file, one JSON a line, as they come")
    parser.addoption("--try-out", action="store_true", help="run GPU cases once, on the CPU with the embedded model")


@pytest.fixture
def keep(request: pytest.FixtureRequest) -> Keep:
    """Takes the records of one case."""

    def append(records: list[dict[str, Any]]) -> None:
        path = request.config.getoption("records")
        if path is not None:
            with path.open("a") as file:
                file.writelines(json.dumps({"peak_memory_bytes": None} | record) + "\n" for record in records)

    return append


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available() and not config.getoption("try_out"):
        for item in items:
            if item.path.name.startswith("test_gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
