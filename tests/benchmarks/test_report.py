"""The tables of the README and of docs/ come from the committed result files, and from nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report

_CPU = {
    "cpu": "Some CPU",
    "cpu_flags": "AVX2",
    "threads": 2,
    "commit": "0123456789abcdef",
    "versions": {"torch": "2.13.0", "diffusers": "0.42.1"},
}
_RECORD: dict[str, Any] = {
    "case": "guided_step",
    "dtype": "float32",
    "rows": 2,
    "p10_ms": 1.0,
    "p90_ms": 9.0,
    "rel_error": 1e-7,
    "peak_memory_bytes": 2 * 10**9,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return tmp_path


def test_pages_are_current() -> None:
    for page in report.PAGES:
        assert report.filled(page) == page.read_text(), f"{page.name}: run python -m benchmarks.report"


def test_every_table_stands_in_one_page() -> None:
    names = [block.group(2) for page in report.PAGES for block in report._SECTION.finditer(page.read_text())]
    assert sorted(names) == sorted(report.tables())


def test_tables_follow_the_files(folder: Path) -> None:
    assert "| guided_step | 2.03 | 5.3 | 3.7 |  | not measured | not measured |" in report.tables()["gpu"]
    assert report.tables()["speed"] == ""
    records = [
        _RECORD | {"system": "twinstream", "median_ms": 4.0},
        _RECORD | {"system": "diffusers_eager", "median_ms": 6.0},
        _RECORD | {"system": "diffusers_compile", "median_ms": 3.0},
        _RECORD | {"system": "openvino", "median_ms": 2.0, "rel_error": 3e-7},
        _RECORD | {"case": "vae_decode", "system": "twinstream", "median_ms": 1234.5},
        _RECORD | {"case": "vae_decode", "system": "diffusers_eager", "median_ms": 2469.0},
        _RECORD | {"case": "geglu", "system": "twinstream", "median_ms": 1.0, "bytes": 5e6},
        _RECORD | {"case": "geglu", "system": "torch_eager", "median_ms": 2.0, "bytes": 5e6},
        _RECORD | {"case": "copy", "rows": 1, "system": "ceiling", "median_ms": 1.0, "bytes": 2e7},
    ]
    (folder / "a.json").write_text(json.dumps({"machine": _CPU, "records": records}))
    tables = report.tables()
    ours_and_theirs = "| 4.0 (1.0 to 9.0) | 6.0 (1.0 to 9.0) | 1.50x | 3.0 (1.0 to 9.0) | 0.75x"
    and_openvino = "| 2.0 (1.0 to 9.0) | 0.50x | 1.0e-07 (1.0e-07, 3.0e-07) | 2.0 (2.0) |"
    assert f"| guided_step | float32 | 2 {ours_and_theirs} {and_openvino}" in tables["speed"]
    alone = "| vae_decode | float32 | 2 | 1,234 (1 to 9) | 2,469 (1 to 9) | 2.00x"
    assert f"{alone} | not measured |  | not measured |  | 1.0e-07 (1.0e-07) | 2.0 (2.0) |" in tables["speed"]
    assert "| geglu | float32 | 1.0 (1.0 to 9.0) | 2.0 (1.0 to 9.0) | 2.00x | 5 GB/s | 25 % of 20 |" in tables["ops"]
    assert "commit 012345678 " in tables["speed"]
    assert tables["methods"] == ""


def test_the_peer_of_the_methods_is_named(folder: Path) -> None:
    for case in ("infusion_shared", "dci_mixing_step_full_size"):
        records = [
            _RECORD | {"case": case, "system": "twinstream", "median_ms": 4.0},
            _RECORD | {"case": case, "system": "diffusers_eager", "median_ms": 8.0},
        ]
        (folder / "a.json").write_text(json.dumps({"machine": _CPU, "records": records}))
        tables = report.tables()
        assert tables["speed"] == ""
        assert f"| {case} | float32 | 2 | 4.0 (1.0 to 9.0) | 8.0 (1.0 to 9.0) | 2.00x |" in tables["methods"]
        assert "our map-writing processor on diffusers' modules, one concept at a time" in tables["methods"]


def test_the_summary_takes_a_case_from_the_newest_cpu_file(folder: Path) -> None:
    step = _RECORD | {"case": "guided_step_full_size"}
    files = {
        "a": [step | {"system": "twinstream", "median_ms": 4000.0}],
        "b": [
            step | {"system": "twinstream", "median_ms": 9000.0},
            step | {"system": "diffusers_eager", "median_ms": 6000.0},
        ],
    }
    for (name, records), date in zip(files.items(), ("2026-11-24", "2026-11-23"), strict=True):
        about = _CPU | {"device": "cpu", "date": date}
        (folder / f"{name}.json").write_text(json.dumps({"machine": about, "records": records}))
    row = "| guided step, 512x512 | float32 | 4.00 | not measured | not measured | not measured |"
    assert row in report.tables()["summary"]


def test_gpu_figures_come_from_a_gpu(folder: Path) -> None:
    about = {"device": "Some GPU", "commit": "0123456789abcdef", "versions": {"torch": "2.13.0", "diffusers": "0.42.1"}}
    record = _RECORD | {"dtype": "float16", "peak_memory_bytes": None}
    records = [
        record | {"rows": rows, "system": system, "median_ms": time}
        for rows in (2, 8)
        for system, time in (("twinstream", 4.5 * rows / 2), ("diffusers_eager", 9.0 * rows / 2))
    ]
    records.append(record | {"case": "cold_start", "system": "twinstream", "median_ms": 1.0, "rel_error": None})
    (folder / "gpu.json").write_text(json.dumps({"machine": about, "records": records}))
    tables = report.tables()
    assert "| guided_step | 2.03 | 5.3 | 3.7 |  | 4.50 | not measured |" in tables["gpu"]
    assert "| vae_decode | 3.2 | 8 | 5.5 |  | not measured | not measured |" in tables["gpu"]
    assert "Some GPU, torch 2.13.0" in tables["speed"]
    assert "| guided_step | float16 | 8 | 18.0 (1.0 to 9.0) | 36.0 (1.0 to 9.0) | 2.00x |" in tables["speed"]
    assert "4.5" not in tables["summary"]


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

    tables = "\n".join(report.tables().values())
    assert "Infusion on tinyworld, **defaults**: every setting as the library has it; 5 reference" in tables
    assert "Infusion on tinyworld, **tuned**: training's learning_rate 0.03, drawing's guidance_scale 4; 5" in tables
    row = "| checkered-teapot | text | parallel | 50 (25 to 75) [50] |"
    assert tables.count(row) == 2
    assert "| 100.0 | 97 [12] | 75 s |" in tables
    assert "ICO and DCI on tinyworld, **defaults**: every setting as the library has it; checkered-teapot (be" in tables
    assert "**tuned**: training's context_learning_rate 0.01, dci's auxiliary_noun (mug for teapot); check" in tables
    assert "500 steps of 4 pictures, learning rate 0.01 (of contexts 0.01) (75 to 75 s)" in tables
    assert tables.count("| DCI, no masks | 50 (") == 2
