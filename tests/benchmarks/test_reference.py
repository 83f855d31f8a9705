"""The reference is what the docstrings say."""

import inspect

import engine
from benchmarks import reference


def test_the_page_is_current() -> None:
    assert reference.PAGE.read_text() == reference.page(), "run python -m benchmarks.reference"


def test_every_public_name_is_in_it() -> None:
    text = reference.page()
    for name in set(engine.__all__) - {"__version__"}:
        assert f"### engine.{name}\n" in text
    for method in ("Engine.generate", "Engine.warmup", "Result.save", "Concept.load"):
        assert f"#### {method}\n" in text


def test_generate_has_all_its_arguments() -> None:
    entry = reference.page().split("#### Engine.generate\n")[1].split("####")[0]
    for name in list(inspect.signature(engine.Engine.generate).parameters)[1:]:
        assert f"    {name}: " in entry or f"    **{name}: " in entry, name


def test_sections_become_lists() -> None:
    doc = (
        "Draw V* of <b>.\n\nArgs:\n    height, width: in ``pixels``,\n        both.\n\nRaises:\n"
        "    ValueError: it is odd."
    )
    shown = (
        "Draw V\\* of &lt;b>.\n\n\n**Arguments**\n\n- `height`, `width`: in `pixels`, both.\n\n\n**Raises**\n\n"
        "- `ValueError`: it is odd.\n"
    )
    assert reference._rendered(doc) == shown
