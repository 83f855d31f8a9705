"""Write ``docs/reference.md`` from docstrings: ``python -m benchmarks.reference [--check]``.

Plain Python: signatures from ``inspect``, sections of Google-style docstrings as lists. ``--check`` only tells if the
page is current.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import engine

PAGE = Path(__file__).parent.parent / "docs" / "reference.md"
_HEAD = """# Reference

Everything that `import engine` offers, written from the docstrings by `python -m benchmarks.reference`. What is not
here is not public, and may change.
"""
_ORDER = {
    "Drawing": ("load", "generate", "Engine", "Result", "SAMPLERS", "read_settings"),
    "Customisation": ("Infusion", "ICO", "DCI", "Concept", "Control", "load_controlnet", "IPAdapter", "ImagePrompt"),
    "Training and importing": ("train_infusion", "train_ico", "import_textual_inversion", "import_custom_diffusion"),
    "Errors": (),  # and whatever is in no other group
}
_RETURNED = {"AttentionMaps": "observe.word_maps", "BranchMasks": "observe.masks", "Warmup": "backends.graphs"}
_SECTIONS = ("Args", "Attributes", "Returns", "Raises")
_ITEM = re.compile(r"([A-Za-z_*][\w*, ]*?):\s+(.*)", re.DOTALL)
_CODE = re.compile(r"(`[^`]+`)")
_LONG = 88


def page() -> str:
    """The whole reference."""
    groups = {title: list(names) for title, names in _ORDER.items()}
    placed = {name for names in groups.values() for name in names}
    groups["Errors"] = [name for name in engine.__all__ if name not in placed and name != "__version__"]
    parts = [_HEAD]
    for title, names in groups.items():
        parts += [f"## {title}", *(_entry(f"engine.{name}", getattr(engine, name)) for name in names)]
    parts += ["## Types that come back", "Not to be made by callers; they are what results hold.\n"]
    for name, module in _RETURNED.items():
        parts.append(_entry(name, getattr(import_module(f"engine.{module}"), name)))
    return "\n".join(parts)


def _entry(name: str, value: Any) -> str:
    lines = [f"### {name}\n"]
    if isinstance(value, dict):
        return "\n".join([*lines, "The names that `sampler` takes: " + ", ".join(f"`{key}`" for key in value) + ".\n"])
    is_error = inspect.isclass(value) and issubclass(value, Exception)
    if is_error:
        bases = ", ".join(f"`{base.__name__}`" for base in value.__bases__)
        lines.append(f"An error; a {bases}.\n")
    elif not inspect.isclass(value) or (is_dataclass(value) and name.startswith("engine.")):
        lines.append(_signature(name, value))
    lines.append(_rendered(inspect.getdoc(value) or ""))
    if inspect.isclass(value) and not is_error:
        lines += [_member(name.rpartition(".")[2], *member) for member in _members(value)]
    return "\n".join(lines)


def _members(value: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties of the class itself, in the order of its source."""
    for name, member in vars(value).items():
        inner = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        getter = getattr(member, "fget", None) or getattr(member, "func", None)  # a property, plain or cached
        if not name.startswith("_") and (inspect.isfunction(inner) or getter) and inspect.getdoc(getter or inner):
            yield name, member


def _member(owner: str, name: str, member: Any) -> str:
    getter = getattr(member, "fget", None) or getattr(member, "func", None)
    if getter is not None:
        kind = _annotation(inspect.signature(getter).return_annotation)
        return f"#### {owner}.{name}\n\nProperty, `{kind}`.\n\n{_rendered(inspect.getdoc(getter) or '')}"
    function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
    return (
        f"#### {owner}.{name}\n\n{_signature(f'{owner}.{name}', function)}\n{_rendered(inspect.getdoc(member) or '')}"
    )


def _signature(name: str, value: Any) -> str:
    """A code block with the signature, one parameter a line where it is long."""
    signature = inspect.signature(value)
    parts, kinds = [], [parameter.kind for parameter in signature.parameters.values()]
    for i, parameter in enumerate(signature.parameters.values()):
        if parameter.name in ("self", "cls"):
            continue
        keyword = inspect.Parameter.KEYWORD_ONLY
        if parameter.kind == keyword and kinds[i - 1] not in (keyword, inspect.Parameter.VAR_POSITIONAL):
            parts.append("*")
        parts.append(_parameter(parameter))
    returned = signature.return_annotation
    end = "" if returned is inspect.Signature.empty or inspect.isclass(value) else f" -> {_annotation(returned)}"
    line = f"{name}({', '.join(parts)}){end}"
    if len(line) > _LONG:
        line = f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){end}"
    return f"```py\n{line}\n```\n"


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text, default = stars + parameter.name, parameter.default
    if parameter.annotation is not inspect.Parameter.empty:
        text += f": {_annotation(parameter.annotation)}"
    if default is inspect.Parameter.empty:
        return text
    shown = f'"{default}"' if isinstance(default, str) else repr(default)
    if shown == "<factory>":  # of a dataclass
        shown = "{}"
    elif len(shown) > 40 or shown.startswith("<"):
        shown = "..."
    return f"{text} = {shown}" if ":" in text else f"{text}={shown}"


def _annotation(value: Any) -> str:
    text = value if isinstance(value, str) else inspect.formatannotation(value)
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])", "", text)


def _rendered(doc: str) -> str:
    """Markdown of a docstring: paragraphs, and its sections as lists."""
    lines: list[str] = []
    section, items = "", list[str]()
    for line in [*doc.splitlines(), "End:"]:
        title = line.removesuffix(":")
        if line == "End:" or (title in _SECTIONS and line.endswith(":")):
            lines += _listed(section, items)
            section, items = title, []
        elif not section:
            lines.append(_escaped(line.replace("``", "`")))
        elif line.startswith("     ") and items:  # goes on
            items[-1] += " " + line.strip()
        elif line.strip():
            items.append(line.strip())
    return "\n".join(lines).strip() + "\n"


def _listed(section: str, items: list[str]) -> list[str]:
    if not section:
        return []
    if section == "Returns":
        items = [" ".join(items)]
    title = {"Args": "Arguments"}.get(section, section)
    return ["", f"**{title}**", "", *(f"- {_item(section, item.replace('``', '`'))}" for item in items), ""]


def _item(section: str, item: str) -> str:
    found = None if section == "Returns" else _ITEM.fullmatch(item)
    if found is None:
        return _escaped(item)
    names = ", ".join(f"`{name.strip()}`" for name in found.group(1).split(","))
    return f"{names}: {_escaped(found.group(2))}"


def _escaped(text: str) -> str:
    """Marks that Markdown would take for its own, outside code."""
    parts = _CODE.split(text)
    plain = (re.sub(r"([*_\[\]])", r"\\\1", part).replace("<", "&lt;") for part in parts)
    return "".join(part if part.startswith("`") else other for part, other in zip(parts, plain, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        return int(not PAGE.exists() or PAGE.read_text() != page())
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
