"""The small judge is trained once from its own code, and sees as the whole one does."""

from pathlib import Path

import pytest
import torch

from benchmarks.tinyworld import look_judge, small_judge
from benchmarks.tinyworld.concepts import CONCEPTS, reference_pictures
from benchmarks.tinyworld.data import to_tensor


def test_it_is_kept_and_sees_every_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_DRAWINGS": 40, "_STEPS": 2, "_RECONSTRUCTED": 20, "_VAE_STEPS": 1}.items():
        monkeypatch.setattr(small_judge, name, value)
    monkeypatch.setattr(look_judge, "_HELD_OUT", 20)
    judge = small_judge.small_judge(tmp_path)
    assert set(judge.accuracy) == {"noun", "colour", "pattern", "pattern_colour", "silhouette_overlap"}
    assert not any(parameter.requires_grad for parameter in judge.parameters())
    (look,) = judge.see(to_tensor(reference_pictures("striped-cat")[:1]))
    assert set(look.chances) >= {CONCEPTS["striped-cat"].noun}
    monkeypatch.setattr(small_judge, "train_small_judge", None)
    again = small_judge.small_judge(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(judge.parameters(), again.parameters(), strict=True))
    assert [path.name[:12] for path in tmp_path.iterdir()] == ["small-judge-"]
