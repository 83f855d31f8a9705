"""Prompts that vary from seed to seed: ``__name__`` is a line of a file, ``{a|b}`` one of its alternatives.

Only the command line knows them: what ``generate`` is given, and what a picture's settings say, is the outcome.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

_TOKEN = re.compile(r"\\[{}]|[{}]|__(?P<name>[A-Za-z0-9][A-Za-z0-9 ./-]*(?:_[A-Za-z0-9 ./-]+)*)__")
_DEEPEST = 20  # lines and alternatives within one another


def has_choices(text: str) -> bool:
    """Whether ``expand`` would change anything of a text."""
    return any(match["name"] or match[0] in ("{", r"\{", r"\}") for match in _TOKEN.finditer(text))


def expand(text: str, seed: int, folder: Path | None, use: str = "prompt") -> str:
    """A text with every choice made, the same ones for the same seed, text and files.

    Alternatives and lines may hold others. Braces without ``|`` between them, and ``\\{`` and ``\\}``, mean themselves.

    Args:
        text: with ``{a|b}`` and ``__name__``.
        seed: of the image.
        folder: where ``name.txt`` is, a line each; empty lines and those that begin with # are none.
        use: tells the choices of two texts of one image apart.

    Raises:
        ValueError: there is no such file, or choices go round in a circle.
    """
    return _Expansion(seed, folder, use).expand(text)


class _Expansion:
    def __init__(self, seed: int, folder: Path | None, use: str) -> None:
        self.folder = folder
        self.draws = (f"{seed}/{use}/{i}".encode() for i in itertools.count())

    def expand(self, text: str, depth: int = 0) -> str:
        if depth > _DEEPEST:
            raise ValueError(f"wildcards must not hold themselves, got {text!r} again and again")
        parts, end = list[str](), 0
        while (match := _TOKEN.search(text, end)) is not None:
            parts.append(text[end : match.start()])
            end = match.end()
            if match["name"]:
                parts.append(self.expand(self._one_of(_lines(match["name"], self.folder)), depth + 1))
            elif match[0] == "{" and (close := _closing(text, end)) is not None:
                inner, end = text[end:close], close + 1
                alternatives = list(_split(inner))
                chosen = self.expand(self._one_of(alternatives), depth + 1)
                parts.append(chosen if len(alternatives) > 1 else f"{{{chosen}}}")
            else:
                parts.append(match[0].removeprefix("\\"))
        return "".join([*parts, text[end:]])

    def _one_of(self, choices: list[str]) -> str:
        if len(choices) == 1:
            return choices[0]
        return choices[int.from_bytes(hashlib.sha256(next(self.draws)).digest()[:8], "big") % len(choices)]


def _closing(text: str, start: int) -> int | None:
    """Where the brace that was opened before ``start`` is closed."""
    depth = 1
    for match in re.compile(r"\\[{}]|[{}]").finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if not depth:
            return match.start()
    return None


def _split(text: str) -> Iterator[str]:
    """The alternatives between braces, at the bars that are in no inner ones."""
    depth, start = 0, 0
    for match in re.finditer(r"\\[{}]|[{}|]", text):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if match[0] == "|" and not depth:
            yield text[start : match.start()]
            start = match.end()
    yield text[start:]


def _lines(name: str, folder: Path | None) -> list[str]:
    if folder is None:
        raise ValueError(f"__{name}__ needs a folder of wildcards: give --wildcards FOLDER")
    return list(_read(name, folder))


@lru_cache(maxsize=256)
def _read(name: str, folder: Path) -> tuple[str, ...]:
    path = (folder / f"{name}.txt").resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        there = sorted(one.relative_to(folder).with_suffix("").as_posix() for one in folder.rglob("*.txt"))
        raise ValueError(f"__{name}__ must be a .txt file in {folder}, which has {', '.join(there[:10]) or 'none'}")
    text = path.read_text(encoding="utf-8-sig")
    lines = tuple(line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#"))
    if not lines:
        raise ValueError(f"{path}: must have at least one line, got none")
    return lines
