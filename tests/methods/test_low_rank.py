"""A concept saved at a rank draws what it drew: exactly at full rank, nearly so below."""

from pathlib import Path

import numpy as np
import torch

import engine
from tests.pipelines import relative_error


def test_a_concept_of_a_rank_draws(small: engine.Engine, tmp_path: Path) -> None:
    pictures = [np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)]
    rates = {"learning_rate": 0.02, "context_learning_rate": 0.0}
    concept = engine.train_ico(small, pictures, "cat", steps=3, batch_size=1, progress=False, **rates)

    def draw(rank: int | None) -> torch.Tensor:
        concept.save(tmp_path / "v.safetensors", rank=rank)
        custom = engine.ICO([engine.Concept.load(tmp_path / "v.safetensors")])
        return small.generate("a V* cat", steps=2, seed=0, customization=custom, progress=False).latents

    whole = draw(None)
    full, low = relative_error(draw(48), whole), relative_error(draw(1), whole)
    assert full < 1e-2
    assert full < low
