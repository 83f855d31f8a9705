"""The figure of training steps is cut from the right places of the right sheets."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import engine
from benchmarks.tinyworld import overfitting_figure
from benchmarks.tinyworld.overfitting_figure import CHECKPOINTS, METHODS, PROMPTS, RATES, figure


def test_cells_are_their_methods_steps_and_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grey = Image.new("RGB", (128, 128), (128, 128, 128))
    monkeypatch.setattr(engine, "generate", lambda texts, **_: SimpleNamespace(images=[grey] * len(texts)))
    monkeypatch.setattr(overfitting_figure, "_COLOURS", 256)
    for m, pattern in enumerate(METHODS.values()):
        for c, steps in enumerate(CHECKPOINTS):
            sheet = Image.new("RGB", (12 * 128, 128))
            for prompt in range(12):
                sheet.paste((60 * m, 60 * c, 20 * prompt), (128 * prompt, 0, 128 * prompt + 128, 128))
            sheet.save(tmp_path / f"striped-cat-{pattern.format(**RATES)}-{steps}.png")
    page = figure("striped-cat", tmp_path).convert("RGB")
    side, left = overfitting_figure._SIDE, overfitting_figure._LEFT
    top = page.height - len(METHODS) * side
    for m in range(len(METHODS)):
        for c in range(len(CHECKPOINTS)):
            for k, prompt in enumerate(PROMPTS):
                x = left + k * (len(CHECKPOINTS) * side + overfitting_figure._GAP) + c * side
                found = page.getpixel((x + side // 2, top + m * side + side // 2))
                assert isinstance(found, tuple)
                assert all(abs(a - b) <= 8 for a, b in zip(found, (60 * m, 60 * c, 20 * prompt), strict=True))
