"""DreamBench's layout: a folder of pictures a subject, and a text with classes and prompts (Ruiz et al. 2023).

The data set itself (30 subjects, 25 prompts, CC-BY-4.0) is Google's: github.com/google/dreambooth. Any folder of this
layout will do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_PICTURES = (".jpg", ".jpeg", ".png", ".webp")
_SUBJECT = re.compile(r"^([\w.-]+),([^,]+)$")
_PROMPT = re.compile(r"^'(.*)'\.format\(unique_token, class_token\),?$")
PROMPTS_FILE = "prompts_and_classes.txt"
LIVE_CLASSES = ("cat", "dog")  # whose prompts are the file's "Live Subject Prompts"


@dataclass(frozen=True, slots=True)
class Subject:
    """One subject.

    Attributes:
        name: its folder's.
        noun: its class.
        pictures: its reference pictures, in the order of their names.
        prompts: with the places {0} for the concept's own word and {1} for its class.
    """

    name: str
    noun: str
    pictures: tuple[Path, ...]
    prompts: tuple[str, ...]


def read_dataset(folder: str | Path) -> Mapping[str, Subject]:
    """The subjects that have pictures, by name.

    Raises:
        ValueError: the folder, its text or a part of it is missing; the message says what.
    """
    folder = Path(folder)
    path = folder / PROMPTS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} must be a folder in DreamBench's layout, with a {PROMPTS_FILE}; it has none")
    classes, prompts = dict[str, str](), dict[str, list[str]]()
    section = ""
    for line in map(str.strip, path.read_text(encoding="utf-8").splitlines()):
        if line.endswith("Prompts"):
            section = line
        elif found := _PROMPT.match(line):
            prompts.setdefault(section, []).append(found.group(1))
        elif not section and line != "subject_name,class" and (found := _SUBJECT.match(line)):
            classes[found.group(1)] = found.group(2).strip()
    for name in ("Object Prompts", "Live Subject Prompts"):
        if not prompts.get(name):
            raise ValueError(f"{path} must have a list of {name}, found {', '.join(prompts) or 'none'}")
    subjects = {}
    for name, noun in classes.items():
        own = folder / name
        pictures = sorted(file for file in own.iterdir() if file.suffix.lower() in _PICTURES) if own.is_dir() else []
        if pictures:
            kind = "Live Subject Prompts" if noun in LIVE_CLASSES else "Object Prompts"
            subjects[name] = Subject(name, noun, tuple(pictures), tuple(prompts[kind]))
    if not subjects:
        raise ValueError(f"{path} must name subjects with a folder of pictures each; {folder} has none of them")
    return subjects


def fill(prompt: str, word: str, noun: str) -> str:
    """A prompt for a concept that is called ``word`` before its noun; "" where it has no word of its own."""
    return " ".join(prompt.format(word, noun).split())
