"""Concepts: what a customisation has learned, as data on the text side, and its file.

A file is one safetensors archive with a flat tensor ``residuals`` (float16, or int8 beside a tensor ``scales``) and
text metadata that says what the numbers are. Everything is checked when it is read.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from .checks import check_choice
from .errors import ConceptFileError

_FORMAT, _VERSION = "twinstream-concept", "1"
_SPACES = ("text", "value")
_MAX_FILE_BYTES, _MAX_HEADER_BYTES, _MAX_LAYERS = 1_000_000, 100_000, 256
_FIELDS = ("format", "version", "method", "noun", "space", "layers", "base", "training")
_LOOKS = {
    b"PK": "a zip or pickle file; pickle files can run code when read, and are refused",
    b"\x80": "a pickle file; pickle files can run code when read, and are refused",
    b"<": "a web page; download the file itself",
    b"version https://git-lfs": "a git-lfs pointer; fetch the file itself",
}


@dataclass(frozen=True, eq=False)
class Concept:
    """A learned concept for ``Infusion``.

    Attributes:
        noun: the class noun it customises, as prompts spell it.
        residuals: per cross-attention layer, by the layer's name in the UNet, one vector: in text space (E,), added
            to the noun's encoding before the value projection; in value space (C,), after it.
        space: "text" or "value".
        base: fingerprint of the model it was trained on; see ``fingerprint``. Empty where unknown.
        training: how it was made, JSON-serialisable.
        name: for messages; a file's stem.
    """

    noun: str
    residuals: Mapping[str, Tensor]
    space: str = "text"
    base: tuple[float, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.noun, str) or not self.noun.strip():
            raise ValueError(f"noun must be a word or words, got {self.noun!r}")
        check_choice("space", self.space, _SPACES)
        if not isinstance(self.residuals, Mapping) or not self.residuals:
            raise ValueError(f"residuals must map layer names to vectors, got {self.residuals!r}")
        for layer, residual in self.residuals.items():
            if not isinstance(residual, Tensor) or residual.ndim != 1 or not residual.is_floating_point():
                found = tuple(residual.shape) if isinstance(residual, Tensor) else type(residual).__name__
                raise ValueError(f"residuals must be floating-point vectors, got {found} for {layer!r}")
            if not torch.isfinite(residual).all():
                raise ValueError(f"residuals must be finite, got NaN or infinity for {layer!r}")
        if not self.name:
            object.__setattr__(self, "name", self.noun)

    def save(self, path: str | Path, dtype: str = "float16") -> None:
        """Write the concept; an existing file is replaced in one step, or not at all.

        Args:
            path: usually ends in ``.safetensors``.
            dtype: "float16", or "int8" with one scale per layer (about half the size).

        Raises:
            ValueError: a residual exceeds float16's range.
        """
        check_choice("dtype", dtype, ("float16", "int8"))
        vectors = [residual.detach().cpu().float() for residual in self.residuals.values()]
        if dtype == "int8":
            scales = torch.stack([vector.abs().max() / 127 for vector in vectors])
            steps = [vector / scale if scale else vector for vector, scale in zip(vectors, scales, strict=True)]
            tensors = {"residuals": torch.cat(steps).round().to(torch.int8), "scales": scales}
        else:
            tensors = {"residuals": torch.cat(vectors).half()}
            if not torch.isfinite(tensors["residuals"]).all():
                raise ValueError(f"residuals must fit float16 to be saved, got {torch.cat(vectors).abs().max():g}")
        metadata = {
            "format": _FORMAT,
            "version": _VERSION,
            "method": "infusion",
            "noun": self.noun,
            "space": self.space,
            "layers": _compact({_shorten(name): len(vector) for name, vector in self.residuals.items()}),
            "base": _compact([round(value, 4) for value in self.base]),
            "training": _compact(dict(self.training)),
        }
        write_atomically(Path(path), save_tensors(tensors, metadata))

    @classmethod
    def load(cls, path: str | Path) -> Concept:
        """Read a concept file.

        Raises:
            ConceptFileError: it is not one, is damaged, or holds what a concept cannot; the message names the file.
        """
        path = Path(path)
        try:
            return cls._from_bytes(_read(path), path.stem)
        except (ValueError, SafetensorError) as error:
            raise ConceptFileError(f"{path}: {error}") from error

    @classmethod
    def _from_bytes(cls, data: bytes, name: str) -> Concept:
        metadata = _metadata(data)
        tensors = load_tensors(data)
        layers = _decode(metadata, "layers", dict)
        widths = list(layers.values())
        if not 0 < len(layers) <= _MAX_LAYERS or any(type(width) is not int or width < 1 for width in widths):
            raise ValueError(f"layers must give 1 to {_MAX_LAYERS} layers and their widths, found {layers}")
        flat = tensors.get("residuals")
        expected = {"residuals", "scales"} if flat is not None and flat.dtype == torch.int8 else {"residuals"}
        if tensors.keys() != expected:
            raise ValueError(f"the file must hold the tensors {sorted(expected)}, found {sorted(tensors)}")
        assert flat is not None
        if flat.dtype not in (torch.float16, torch.int8) or flat.shape != (sum(widths),):
            rule = f"residuals must be float16 or int8 of shape ({sum(widths)},)"
            raise ValueError(f"{rule}, found {flat.dtype} of shape {tuple(flat.shape)}")
        vectors = list(flat.float().split(widths))
        if "scales" in tensors:
            scales = tensors["scales"]
            if scales.dtype != torch.float32 or scales.shape != (len(widths),):
                rule = f"scales must be float32 of shape ({len(widths)},)"
                raise ValueError(f"{rule}, found {scales.dtype} of shape {tuple(scales.shape)}")
            vectors = [vector * scale for vector, scale in zip(vectors, scales, strict=True)]
        base = _decode(metadata, "base", list)
        if any(isinstance(value, bool) or not isinstance(value, int | float) for value in base):
            raise ValueError(f"base must be a list of numbers, found {base}")
        return cls(
            noun=metadata["noun"],
            residuals=dict(zip(map(_lengthen, layers), vectors, strict=True)),
            space=metadata["space"],
            base=tuple(map(float, base)),
            training=_decode(metadata, "training", dict),
            name=name,
        )


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file through a temporary one in the same folder: a crash leaves the old file, or none, whole."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)  # mkstemp's files are for the owner alone
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise ValueError("must be a concept file, found a folder")
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    if len(data) > _MAX_FILE_BYTES:
        raise ValueError(f"a concept file must be at most {_MAX_FILE_BYTES} bytes; this one is larger")
    return data


def _metadata(data: bytes) -> dict[str, str]:
    """The header's text entries; whether tensors and offsets are sound is for the safetensors library to say."""
    if not data:
        raise ValueError("must be a concept file, found an empty one")
    looks = next((what for start, what in _LOOKS.items() if data.startswith(start)), "")
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8 or length > _MAX_HEADER_BYTES:
        raise ValueError(f"not a whole safetensors file ({len(data)} bytes); it looks {looks or 'truncated'}")
    header = json.loads(data[8 : 8 + length])
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
        raise ValueError("a safetensors file, but not a concept: its metadata has no format 'twinstream-concept'")
    if metadata.get("version") != _VERSION:
        raise ValueError(f"concept file version must be {_VERSION}, found {metadata.get('version')!r}")
    if missing := [name for name in _FIELDS if not isinstance(metadata.get(name), str)]:
        raise ValueError(f"the metadata must have {', '.join(_FIELDS)}; missing {', '.join(missing)}")
    if metadata["method"] != "infusion":
        raise ValueError(f"method must be 'infusion', found {metadata['method']!r}")
    return metadata


def _decode(metadata: Mapping[str, str], name: str, kind: type) -> Any:
    value = json.loads(metadata[name])
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be a JSON {kind.__name__}, found {metadata[name]!r}")
    return value


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _shorten(layer: str) -> str:
    """``down_blocks.0.attentions.1.transformer_blocks.0.attn2`` as ``down_blocks.0/1/0``: names fill the header."""
    return re.sub(r"\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.attn2$", r"/\1/\2", layer)


def _lengthen(layer: str) -> str:
    return re.sub(r"/(\d+)/(\d+)$", r".attentions.\1.transformer_blocks.\2.attn2", layer)
