"""What was found out about a card, kept in a file: which contender serves each call, and why."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ...files import write_atomically
from ...warn import warn
from .calls import Call, Key
from .flags import get_flags

_DRIVER = Path("/sys/module/nvidia/version")


@dataclass(frozen=True, slots=True)
class Choice:
    """Which contender serves, why, and what is wrong with others."""

    serves: str
    why: str
    wrong: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Table:
    """Choices by call and rows, for one card and what runs on it.

    Attributes:
        about: card, versions, flags and kernels that they hold for.
        path: where they are kept.
        choices: by a call's key, then by its rows.
        models: names of models and sizes of which all calls are known.
    """

    about: dict[str, Any]
    path: Path
    choices: dict[Key, dict[int, Choice]] = field(default_factory=dict)
    models: set[str] = field(default_factory=set)

    def __contains__(self, call: Call) -> bool:
        return call.rows in self.choices.get(call.key, {})

    def __iter__(self) -> Iterator[tuple[Key, int, Choice]]:
        for key, by_rows in self.choices.items():
            for rows, choice in sorted(by_rows.items()):
                yield key, rows, choice

    def put(self, key: Key, rows: int, choice: Choice) -> None:
        self.choices.setdefault(key, {})[rows] = choice

    def save(self) -> None:
        """Write the file, whole or not at all, with what other processes have added to it meanwhile."""
        _KEPT[self.path] = self
        other = _read(self.path, self.about)
        self.models |= other.models
        for key, rows, choice in other:
            self.choices.setdefault(key, {}).setdefault(rows, choice)
        entries = [[_plain(key), rows, choice.serves, choice.why, choice.wrong] for key, rows, choice in self]
        data = json.dumps({"about": self.about, "models": sorted(self.models), "choices": entries}, indent=0).encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, data)
        except OSError as error:
            warn(
                f"{self.path} cannot be written ({error}): the card is calibrated again in the next process",
                RuntimeWarning,
            )


_KEPT: dict[Path, Table] = {}  # of this process, for where no file can be written


def open_table(device: torch.device) -> Table:
    """What is known about a card."""
    about = about_card(device)
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path = _folder() / f"{about['card'].replace(' ', '-').replace('/', '-').lower()}-{digest}.json"
    if path in _KEPT:
        return _KEPT[path]
    return _read(path, about)


def _read(path: Path, about: dict[str, Any]) -> Table:
    """What a file holds; nothing where there is none, or it is damaged, or about something else."""
    table = Table(about, path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["about"] != about:
            return table
        entries = [(_key(key), int(rows), Choice(*rest)) for key, rows, *rest in found["choices"]]
        table.models.update(found["models"])
    except FileNotFoundError:
        return table
    except (OSError, ValueError, TypeError, KeyError) as error:
        warn(f"{path} cannot be read ({error}): the card is calibrated again", RuntimeWarning)
        return Table(about, path)
    for key, rows, choice in entries:
        table.put(key, rows, choice)
    return table


def about_card(device: torch.device) -> dict[str, Any]:
    """All that choices depend on."""
    card = torch.cuda.get_device_properties(device)
    return {
        "card": card.name,
        "compute_capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "driver": _DRIVER.read_text(encoding="ascii").strip() if _DRIVER.exists() else "unknown",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **{name: _version(name) for name in ("torch", "triton", "xformers")},
        "flags": get_flags(),
        "kernels": _kernels_digest(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def _kernels_digest() -> str:
    """Of the kernels' sources, and of what proves them and times them."""
    own = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted([*(own.parent.parent / "kernels").glob("*.py"), *own.glob("*.py")]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "twinstream"


def _plain(key: Any) -> Any:
    return [_plain(part) for part in key] if isinstance(key, tuple) else key


def _key(found: Any) -> Any:
    return tuple(_key(part) for part in found) if isinstance(found, list) else found
