"""The mutation tester: what it changes, what it spares, and one run from end to end."""

import ast
from pathlib import Path

import pytest

from tests.mutants import Copy, choose_tests, cover, judge, report, sample
from tests.mutators import find_mutants, is_change

_SOURCE = '''"""A docstring with 3 < 4 and 5."""
from dataclasses import dataclass
from typing import TYPE_CHECKING

__all__ = ["f"] * 1

if TYPE_CHECKING:
    LIMIT = 7


@dataclass(frozen=True)
class Config:
    size: "list[1]" = 2


def f(x: "tuple[8]", scale: float = 0.5) -> "dict[9, 9]":
    """Another, of 6 * 7."""
    if x < 0 and not scale:
        raise ValueError(f"x must be {1 + 1} at least {x - 2}" + str(3 * 4))
    é = (x) + max(x, 3) // g(x, scale)
    return round((é - 1) ** 0.5) if é == 4 else x[1:é].sqrt()


@triton.jit
def kernel(x):
    return x + 1
'''


def _changes() -> dict[str, list[str]]:
    changes = dict[str, list[str]]()
    for mutant in find_mutants("a.py", _SOURCE):
        changes.setdefault(mutant.operator, []).append(mutant.lines(_SOURCE)[2])
    return changes


def test_mutants_are_valid_and_different() -> None:
    mutants = find_mutants("a.py", _SOURCE)
    assert len({mutant.apply(_SOURCE) for mutant in mutants}) == len(mutants) > 20
    for mutant in mutants:
        assert is_change(mutant, _SOURCE)
        line, before, after = mutant.lines(_SOURCE)
        assert before == " ".join(_SOURCE.splitlines()[line - 1].split())
        assert after != before


def test_operators() -> None:
    changes = _changes()
    assert "if x <= 0 and not scale:" in changes["comparison"]
    assert "if x < 0 or not scale:" in changes["logic"]
    assert "if x < 0 and scale:" in changes["not"]
    assert changes["guard"] == ["if False:"]
    assert "é = (x) - max(x, 3) // g(x, scale)" in changes["arithmetic"]
    assert "é = (x) + max(x, 3) // g(scale, x)" in changes["arguments"]
    assert changes["max"] == ["é = (x) + min(x, 3) // g(x, scale)"]
    assert changes["round"] == ["return int((é - 1) ** 0.5) if é == 4 else x[1:é].sqrt()"]
    assert changes["sqrt"] == ["return round((é - 1) ** 0.5) if é == 4 else (x[1:é])"]
    assert "return round((é - 1) ** 0.5) if é == 4 else x[1:(é) + 1].sqrt()" in changes["index"]
    assert 'def f(x: "tuple[8]", scale: float = 1.0) -> "dict[9, 9]":' in changes["constant"]
    assert 'size: "list[1]" = 3' in changes["constant"]


def test_what_is_only_said_is_spared() -> None:
    spared = {"docstring", "Another", "__all__", "TYPE_CHECKING", "LIMIT", "frozen", "raise", "return x + 1"}
    for mutant in find_mutants("a.py", _SOURCE):
        assert not any(word in mutant.lines(_SOURCE)[1] for word in spared)
        assert ast.get_docstring(ast.parse(mutant.apply(_SOURCE))) == ast.get_docstring(ast.parse(_SOURCE))
    assert all(mutant.function for mutant in find_mutants("a.py", _SOURCE, functions_only=True))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    (root / "engine").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "engine" / "__init__.py").touch()
    (root / "engine" / "ages.py").write_text("def is_adult(age):\n    return age >= 18\n")
    test = "from engine.ages import is_adult\ndef test_is_adult():\n    assert is_adult(18) and not is_adult(5)\n"
    (root / "tests" / "test_ages.py").write_text(test)
    (root / "tests" / "test_other.py").write_text("def test_fails():\n    assert False\n")
    return root


def test_sampling_is_deterministic(project: Path) -> None:
    found = {"engine/ages.py": find_mutants("engine/ages.py", (project / "engine/ages.py").read_text())}
    assert sample(project, found, 2, 0) == sample(project, found, 2, 0)
    source = {"a.py": find_mutants("a.py", _SOURCE)}
    (project / "a.py").write_text(_SOURCE)
    first, second = sample(project, source, 8, 0), sample(project, source, 8, 1)
    assert first != second
    assert len(set(first)) == len(set(second)) == 8


def test_a_run_from_end_to_end(project: Path, tmp_path: Path) -> None:
    before = (project / "engine/ages.py").read_text()
    copy = Copy(project, tmp_path / "copy", ["pytest"])
    covered = cover(copy, ["tests/test_ages.py", "tests/test_other.py"], 60, lambda _: None)
    assert covered["tests/test_other.py"].failed == ["tests/test_other.py::test_fails"]
    mutants = find_mutants("engine/ages.py", before)
    assert all(choose_tests(mutant, covered) == ["tests/test_ages.py"] for mutant in mutants)
    outcomes = {mutant.operator: judge(copy, mutant, covered) for mutant in mutants}
    assert outcomes == {"comparison": "killed", "constant": "killed"}
    weaker = before.replace("18", "17")  # at which only 17 tells > from >=
    (copy.folder / "engine/ages.py").write_text(weaker)
    (survivor,) = (mutant for mutant in find_mutants("engine/ages.py", weaker) if mutant.operator == "comparison")
    assert judge(copy, survivor, covered) == "survived"
    assert (copy.folder / "engine/ages.py").read_text() == weaker
    (project / "engine/ages.py").write_text(weaker)
    result = report(project, [(mutants[0], "killed"), (survivor, "survived")], [], 0)
    assert (result["all"]["tried"], result["all"]["score"]) == (2, 0.5)
    (told,) = result["survivors"]
    assert (told["line"], told["original"], told["mutated"]) == (2, "return age >= 17", "return age > 17")
    reason = {name: told[name] for name in ("file", "original", "mutated")} | {"reason": "equivalent: made up"}
    assert report(project, [(survivor, "survived")], [reason], 0)["all"]["explained"] == 1
