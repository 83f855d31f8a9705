"""The toy studies, small: what the paper's figures 5 and 6 show."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from engine.cli import main
from engine.evaluate.toy import Toy, _measure, make_world, study


def test_agnostic_tuning_of_all_weights_changes_the_other_concepts() -> None:
    result, _ = study("agnostic", steps=400)
    base, tuned, what = (result["measures"][name] for name in ("base", "all weights", "what alone"))
    assert (base["modes kept"], what["modes kept"], base["segments"]) == (4, 4, 0)
    assert what["Fisher"] == base["Fisher"] == 0  # other classes cannot tell
    assert what["W2"] == base["W2"]
    assert what["segments"] == 1
    assert tuned["Fisher"] > 0.05
    assert abs(tuned["spread of others"] - 1) > 0.1


def test_specific_tuning_of_what_alone_keeps_more_modes() -> None:
    result, figure = study("specific", steps=1500)
    base, tuned, what = (result["measures"][name] for name in ("base", "all weights", "what alone"))
    assert (base["modes kept"], base["segments"]) == (25, 0)
    assert tuned["modes kept"] < what["modes kept"]
    assert what["segments"] > 5  # more than it was tuned on
    assert figure.width == 4 * 360


def test_measures_of_points_that_are_known() -> None:
    world = make_world("specific")
    generator = torch.Generator().manual_seed(0)
    base = Toy(1, world.centres)
    gaussians = world.gaussians(2500, generator)
    segments = world.segments(2500, generator)
    plain = _measure(world, base, base, gaussians, gaussians, gaussians)
    assert (plain["modes kept"], plain["segments"], plain["Fisher"], plain["W2"]) == (
        25,
        0,
        0,
        pytest.approx(0, abs=1e-5),
    )
    assert plain["spread of others"] == pytest.approx(1)
    few = _measure(world, base, base, segments, gaussians, gaussians)
    assert (few["modes kept"], few["segments"]) == (5, 5)
    wide = 0.45 / 3**0.5 / (2**0.5 * 0.12)  # of a segment and of a Gaussian in the plane
    assert few["spread of others"] == pytest.approx(wide, rel=0.05)


def test_slots_at_the_modes_are_the_exact_posterior_mean_of_place() -> None:
    world = make_world("agnostic")
    model = Toy(4, world.centres)
    noisy, steps = torch.tensor([[-2.0, 2.0], [0.0, 0.0]]), torch.tensor([5, 5])
    found = model(noisy, steps, torch.tensor([0, 0]))
    torch.testing.assert_close(found, torch.tensor([[-2.0, 2.0], [0.0, 0.0]]), rtol=0, atol=1e-3)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["toy", "agnostic", "--steps", "20", "--out", str(tmp_path)]) == 0
    assert "all weights" in capsys.readouterr().out
    assert json.loads((tmp_path / "toy-agnostic.json").read_text())["settings"]["modes"] == 4
    assert Image.open(tmp_path / "toy-agnostic.png").height > 300
    assert main(["toy", "mine", "--out", str(tmp_path)]) == 1
    assert "kind must be one of agnostic, specific, got 'mine'" in capsys.readouterr().err
    assert main(["toy", "agnostic", "--steps", "1", "--out", str(tmp_path)]) == 1
    assert "steps must be an integer >= 2" in capsys.readouterr().err
