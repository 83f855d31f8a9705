"""The concepts of a server, by name: those it was given, and those that clients put there."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

from ...engine import Engine
from ...errors import ConceptFileError
from ...files import write_atomically
from ...methods.concept import Concept

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
MAX_CONCEPT_BYTES = 1_000_000


class Shelf:
    """Concept files in two folders; a name never becomes a path before it has been checked.

    Args:
        sd: the model that they must fit.
        folder: what clients may add to and delete from.
        shipped: what they may only use.
    """

    def __init__(self, sd: Engine, folder: Path, shipped: Path) -> None:
        self.sd, self.folder, self.shipped = sd, folder, shipped
        folder.mkdir(parents=True, exist_ok=True)
        self._loaded: dict[Path, tuple[int, Concept]] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        files = [*self.shipped.glob("*.safetensors"), *self.folder.glob("*.safetensors")]
        return sorted({file.stem for file in files if _NAME.fullmatch(file.stem)})

    def load(self, name: str | Path) -> Concept:
        """The concept; a file that has changed is read again.

        Raises:
            ValueError: there is none of that name.
            ConceptFileError: its file cannot be read.
        """
        path = self._find(str(name))
        with self._lock:
            stamp = path.stat().st_mtime_ns
            if path not in self._loaded or self._loaded[path][0] != stamp:
                self._loaded[path] = stamp, Concept.load(path)
            return self._loaded[path][1]

    def facts(self, name: str) -> dict[str, Any]:
        """What a client is told of it."""
        path, concept = self._find(name), self.load(name)
        return {
            "name": name,
            "noun": concept.noun,
            "method": concept.method,
            "placeholder": concept.placeholder if concept.tokens is not None else None,
            "bytes": path.stat().st_size,
            "can_be_deleted": path.parent == self.folder,
        }

    def data(self, name: str) -> bytes:
        return self._find(name).read_bytes()

    def put(self, name: str, data: bytes) -> None:
        """Keep a file, checked, under its name, which must not be a shipped one's.

        Raises:
            ValueError: the name, or the size.
            ConceptFileError: it is no concept, or none of this model.
        """
        _check_name(name)
        if (self.shipped / f"{name}.safetensors").exists():
            raise ValueError(f"name must not be that of a concept that came with the server, got {name!r}")
        if len(data) > MAX_CONCEPT_BYTES:
            raise ValueError(f"a concept must have at most {MAX_CONCEPT_BYTES} bytes, got {len(data)}")
        trial = self.folder / f".{name}.trial"
        try:
            write_atomically(trial, data)
            self._check_fit(Concept.load(trial))
            write_atomically(self.folder / f"{name}.safetensors", data)
        finally:
            trial.unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        path = self._find(name)
        if path.parent != self.folder:
            raise ValueError(f"name must be of a concept that a client put here, got {name!r}")
        path.unlink()
        with self._lock:
            self._loaded.pop(path, None)

    def _check_fit(self, concept: Concept) -> None:
        if concept.method == "infusion":
            self.sd.concepts.residuals(concept)
        else:
            self.sd.concepts.changes(concept)
            width = self.sd.text_encoder.width
            if concept.tokens is not None and concept.tokens.shape[1] != width:
                raise ConceptFileError(f"tokens must be {width} wide for this model, got {concept.tokens.shape[1]}")

    def _find(self, name: str) -> Path:
        _check_name(name)
        for folder in (self.folder, self.shipped):
            path = folder / f"{name}.safetensors"
            if path.is_file():
                return path
        raise LookupError(f"concept must be one of {', '.join(self.names())}, got {name!r}")


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"a concept's name must be 1 to 64 letters, digits, '-' and '_', got {name!r}")
