"""Fixtures: one small random pipeline on disk, and an Engine loaded from it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of a kernel

import engine
from tests.pipelines import save_pipeline

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # workers share the cores


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    save_pipeline("narrow", folder)
    return folder


@pytest.fixture
def agrees(record_property: Callable[[str, object], None]) -> Callable[[str, str, float, float], None]:
    """Asserts that an error is within its bound, and makes it a line of docs/compatibility.md."""

    def check(feature: str, against: str, error: float, bound: float) -> None:
        record_property("compatibility", (feature, against, error))
        assert error <= bound

    return check


@pytest.fixture(scope="session")
def inpainting_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An inpainting model, of nine channels."""
    folder = tmp_path_factory.mktemp("inpainting")
    save_pipeline("narrow", folder, seed=5, in_channels=9)
    return folder


@pytest.fixture(scope="session")
def inpainting(inpainting_folder: Path) -> engine.Engine:
    return engine.load(inpainting_folder)


@pytest.fixture(scope="session")
def small(small_folder: Path) -> engine.Engine:
    return engine.load(small_folder)
