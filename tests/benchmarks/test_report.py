"""The README's tables come from the committed result files, and from nothing else."""

import json
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.choose import faster


def test_readme_is_current() -> None:
    text = report.README.read_text()
    assert report._SECTION.sub(lambda _: report.tables(), text) == text, "run python -m benchmarks.report"


def test_tables_follow_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert "| guided_step | 2.03 | 5.3 | 3.7 | not measured |" in report.tables()
    about = {
        "cpu": "Some CPU",
        "cpu_flags": "AVX2",
        "threads": 2,
        "commit": "0123456789abcdef",
        "versions": {"torch": "2.13.0", "diffusers": "0.42.1"},
    }
    record = {"case": "guided_step", "dtype": "float32", "rows": 2, "p10_ms": 1.0, "p90_ms": 9.0, "rel_error": 1e-7}
    record["peak_memory_bytes"] = 2 * 10**9
    records = [
        record | {"system": "twinstream", "median_ms": 4.0},
        record | {"system": "diffusers_eager", "median_ms": 6.0},
        record | {"case": "geglu", "system": "twinstream", "median_ms": 1.0, "bytes": 5e6},
        record | {"case": "geglu", "system": "torch_eager", "median_ms": 2.0, "bytes": 5e6},
        record | {"case": "copy", "rows": 1, "system": "ceiling", "median_ms": 1.0, "bytes": 2e7},
    ]
    (tmp_path / "a.json").write_text(json.dumps({"machine": about, "records": records}))
    tables = report.tables()
    assert (
        "| guided_step | float32 | 2 | 4.0 (1.0 to 9.0) | 6.0 (1.0 to 9.0) | 1.50x |  | 1.0e-07 (1.0e-07) | 2.0 (2.0) |"
        in tables
    )
    assert "| geglu | float32 | 1.0 (1.0 to 9.0) | 2.0 (1.0 to 9.0) | 2.00x | 5 GB/s | 25 % of 20 | 1.0e-07" in tables
    assert "commit 012345678 " in tables


def test_gpu_figures_come_from_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    about = {"device": "Some GPU", "commit": "0123456789abcdef", "versions": {"torch": "2.13.0", "diffusers": "0.42.1"}}
    record = {"dtype": "float16", "p10_ms": 1.0, "p90_ms": 9.0, "rel_error": 1e-3, "peak_memory_bytes": None}
    records = [
        record | {"case": "guided_step", "rows": rows, "system": system, "median_ms": time}
        for rows in (2, 8)
        for system, time in (("twinstream", 4.5 * rows / 2), ("diffusers_eager", 9.0 * rows / 2))
    ]
    records.append(
        record | {"case": "cold_start", "rows": 2, "system": "twinstream", "median_ms": 1.0, "rel_error": None}
    )
    (tmp_path / "gpu.json").write_text(json.dumps({"machine": about, "records": records}))
    tables = report.tables()
    assert "| guided_step | 2.03 | 5.3 | 3.7 | 4.50 |" in tables
    assert "| vae_decode | 3.2 | 8 | 5.5 | not measured |" in tables
    assert "Some GPU, torch 2.13.0" in tables
    assert "| guided_step | float16 | 8 | 18.0 (1.0 to 9.0) | 36.0 (1.0 to 9.0) | 2.00x |" in tables


def test_studies_name_every_setting_that_is_not_the_librarys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    training = {"steps": 500, "learning_rate": 0.01, "batch_size": 4, "accumulation_steps": 1}
    drawing = {"sampler": "ddim", "steps": 50, "guidance_scale": 8.0}
    about = {"contexts": 10, "seeds": 2, "commit": "0123456789abcdef"}
    defaults = about | {"training": training, "drawing": drawing, "changed": {}}
    changes = {"training": {"learning_rate": 0.03}, "drawing": {"guidance_scale": 4.0}}
    sections = {section: defaults[section] | changes[section] for section in changes}
    tuned = defaults | sections | {"changed": changes}
    share = {"share": 0.5, "interval": [0.25, 0.75], "n": 20}
    shares = dict.fromkeys(("concept", "background", "object"), share)
    judges = {"object_judge_accuracy": {"concept_through_vae": 0.97}, "evaluator_accuracy_on_concept": {}}
    judges["evaluator_accuracy_on_concept"]["concept_through_vae"] = 0.12
    record = judges | {"concept": "checkered-teapot", "judge_accuracy": 1.0, "training_seconds": 75.0}
    drawn = record | {"space": "text", "foundation": "parallel", "customised": shares, "foundation_pictures": shares}
    infusion = {"settings": {"defaults": defaults, "tuned": tuned}, "infusion": []}
    infusion["infusion"] = [drawn | {"settings": name} for name in ("defaults", "tuned")]
    (tmp_path / "infusion.json").write_text(json.dumps(infusion))

    chosen = {"dci": {"strength": 1.0, "fraction": 0.15}}
    changes = {"training": {"context_learning_rate": 0.01}, "dci": {"auxiliary_noun": {"teapot": "mug"}}}
    tuned = defaults | chosen | {"training": training | changes["training"], "changed": changes}
    sweeps = {"ico": shares, "strength": [{"value": 1.0, **shares}], "ablation": [{"value": "no masks", **shares}]}
    gates = [{"positions": 4, "p1": 0.0, "median": 0.5, "p99": 1.0}]
    record |= sweeps | {
        "fraction": [],
        "auxiliary_noun": "mug",
        "spread": dict.fromkeys(("calibrated", "paper"), gates),
    }
    record["compression"] = [{"rank": None, "bytes": 1000, "error": 0.0}]
    settings = {"defaults": defaults | chosen, "tuned": tuned}
    content = {"settings": settings, "dci": [record | {"settings": name} for name in settings]}
    (tmp_path / "dci.json").write_text(json.dumps(content))

    tables = report.tables()
    assert "Infusion on tinyworld, **defaults**: every setting as the library has it; 5 reference" in tables
    assert "Infusion on tinyworld, **tuned**: training's learning_rate 0.03, drawing's guidance_scale 4; 5" in tables
    row = "| checkered-teapot | text | parallel | 50 (25 to 75) [50] |"
    assert tables.count(row) == 2
    assert "| 100.0 | 97 [12] | 75 s |" in tables
    assert "ICO and DCI on tinyworld, **defaults**: every setting as the library has it; checkered-teapot (be" in tables
    assert "**tuned**: training's context_learning_rate 0.01, dci's auxiliary_noun (mug for teapot); check" in tables
    assert "500 steps of 4 pictures, learning rate 0.01 (of contexts 0.01) (75 to 75 s)" in tables
    assert tables.count("| DCI, no masks | 50 (") == 2


def test_the_choice_between_kernels() -> None:
    record = {"op": "attention", "sizes": [40], "median_ms": 1.0, "p90_ms": 1.1}
    slower = record | {"sizes": [80], "p90_ms": 2.5}
    records = [record | {"system": "twinstream"}, record | {"system": "torch_eager", "median_ms": 2.0}]
    records += [slower | {"system": "twinstream"}, slower | {"system": "torch_eager", "median_ms": 2.0}]
    assert faster([*records, {"case": "product", "system": "ceiling"}]) == {"attention": [(40,)]}
