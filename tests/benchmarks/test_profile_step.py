"""A step's profile: every kind of operation is in it, with its work."""

import engine
from benchmarks.profile_step import Row, measure, report


def test_a_steps_operations_are_told_apart() -> None:
    rows = measure(engine.load(device="cpu", dtype="float32"))
    seen = {row.name.split()[0] for row in rows}
    assert {"conv3x3", "attention", "group_norm_silu", "layer_norm_geglu", "linear_add"} <= seen
    assert all(row.seconds > 0 and row.calls > 0 for row in rows)
    assert rows == sorted(rows, key=lambda row: -row.seconds)


def test_the_report_tells_what_is_left_to_gain() -> None:
    rows = [Row("conv3x3 2x320x64x64", 2e9, 1e6, 2, 0.75), Row("silu 2x320", 0.0, 1e9, 1, 0.25)]
    text = report(rows, most_flops=1e10, most_bytes=1e10)
    conv, silu = text.splitlines()[3:5]
    assert conv.split()[-5:] == ["2", "750.000", "75.0%", "400.000", "35.0%"]
    assert silu.split()[-5:] == ["1", "250.000", "25.0%", "100.000", "15.0%"]
