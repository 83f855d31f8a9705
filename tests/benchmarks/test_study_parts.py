"""What the study's page makes of its results."""

from typing import Any

import pytest

from benchmarks import study_page, study_parts
from benchmarks.study_parts import kept, layout_parts, percent, percent_within, sweep_parts


def _share(mean: float, low: float = 0.0, high: float = 0.0) -> dict[str, Any]:
    return {"mean": mean, "interval": [low, high], "n": 3}


def test_a_mean_over_concepts_has_their_combined_interval() -> None:
    records = [{"layout": _share(0.5, 0.44, 0.56)}, {"layout": _share(0.7, 0.62, 0.78)}]
    assert percent(records, "layout") == "60"
    assert percent_within(records, "layout") == "60 ± 5"  # sqrt(6^2 + 8^2) / 2


def test_kept_is_0_by_chance_and_1_at_what_the_judge_can_tell() -> None:
    bounds = {"cat": {"chance": {"layout": _share(0.4)}, "judge": {"layout": _share(0.8)}}}
    for layout, expected in ((0.4, 0.0), (0.8, 1.0), (0.7, 0.75)):
        assert kept({"concept_name": "cat", "layout": _share(layout)}, bounds) == pytest.approx(expected)


def test_tables_have_a_row_for_everything_that_was_measured() -> None:
    parts = layout_parts(study_page.newest("layout")) | sweep_parts(study_page.newest("sweeps"))
    for name in ("layout_drawings", "layout_trainings", "map_mass", "sweep_strength", "sweep_lambda", "sweep_scheme"):
        lines = parts[name].splitlines()
        assert len(lines) > 3
        assert len({line.count("|") for line in lines}) == 1
    assert "| the method |" in parts["layout_drawings"]
    assert "not measured" not in parts["layout_drawings"]


def test_a_sampler_row_has_both_means_and_the_differences_interval() -> None:
    both = {name: [_share(0.5), _share(0.6)] for name in ("likeness", "object", "context", "layout")}
    difference = {name: _share(0.1, -0.02, 0.22) for name in both}
    record = {"sweep": "sampler", "concept_name": "cat", "value": "ICO", "both": both, "difference": difference}
    row = study_parts._sampler_table([record]).splitlines()[-1]
    assert row.startswith("| cat | ICO | 50, 60 (-2 to +22) |")
