"""Concept files: one safetensors archive, with text metadata that says what the numbers are.

Infusion's residuals are one flat tensor ``residuals`` (float16, or int8 beside a tensor ``scales``). ICO's are a tensor
``tokens``, and the changes of keys and values as "<layer>.to_k" and "<layer>.to_v", or two factors of each, ".up" and
".down", all float16. Everything is checked when it is read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from ..errors import ConceptFileError
from ..files import write_atomically

_FORMAT, _VERSION = "twinstream-concept", "1"
_MAX_FILE_BYTES = {"infusion": 1_000_000, "ico": 256_000_000}
_MAX_HEADER_BYTES, _MAX_LAYERS = 100_000, 256
_FIELDS = {
    "infusion": ("noun", "space", "layers", "base", "training"),
    "ico": ("noun", "placeholder", "base", "training"),
}
_LOOKS = {
    b"PK": "a zip or pickle file; pickle files can run code when read, and are refused",
    b"\x80": "a pickle file; pickle files can run code when read, and are refused",
    b"<": "a web page; download the file itself",
    b"version https://git-lfs": "a git-lfs pointer; fetch the file itself",
}


def write_concept(path: Path, method: str, fields: Mapping[str, Any], dtype: str) -> None:
    """Write what a concept holds.

    Args:
        path: the file, which is replaced in one step or not at all.
        method: "infusion" or "ico".
        fields: "noun", "base" and "training", and "residuals" (by layer) and "space", or "tokens", "placeholder" and
            "changes" (by projection, one or two factors).
        dtype: see ``Concept.save``.

    Raises:
        ValueError: a number exceeds float16's range, or the file would be too large to be read again.
    """
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "method": method,
        "noun": fields["noun"],
        "base": _compact([round(value, 4) for value in fields["base"]]),
        "training": _compact(fields["training"]),
    }
    if method == "infusion":
        residuals = fields["residuals"]
        metadata["space"] = fields["space"]
        metadata["layers"] = _compact({_shorten(name): len(vector) for name, vector in residuals.items()})
        tensors = _pack_residuals(residuals.values(), dtype)
    elif dtype != "float16":
        raise ValueError(f"dtype must be float16 for tokens and changes of keys and values, got {dtype!r}")
    else:
        metadata["placeholder"] = fields["placeholder"]
        tensors = {} if fields["tokens"] is None else {"tokens": fields["tokens"]}
        for name, factors in fields["changes"].items():
            ends = (".up", ".down") if len(factors) > 1 else ("",)
            tensors |= {_shorten(name) + end: factor for end, factor in zip(ends, factors, strict=True)}
        tensors = {name: _half(name, tensor) for name, tensor in tensors.items()}
    data = save_tensors(tensors, metadata)
    _check_readable(data, method, len(metadata["training"]))
    write_atomically(path, data)


def _check_readable(data: bytes, method: str, training_bytes: int) -> None:
    """Refuse to write what ``read_concept`` would refuse."""
    header = int.from_bytes(data[:8], "little")
    if header > _MAX_HEADER_BYTES:
        rule = f"names and training must fit a header of {_MAX_HEADER_BYTES} bytes"
        raise ValueError(f"{rule}, got {header} bytes, {training_bytes} of them training; shorten training")
    if len(data) > _MAX_FILE_BYTES[method]:
        raise ValueError(f"a concept file must be at most {_MAX_FILE_BYTES[method]} bytes, got {len(data)}")


def read_concept(path: Path) -> dict[str, Any]:
    """Read what ``write_concept`` wrote, as the fields of a concept.

    Raises:
        ConceptFileError: it is no concept file, is damaged, or holds what none can; the message names the file.
    """
    try:
        data, metadata = _read(path)
        tensors = load_tensors(data)
        own = _unpack_residuals(tensors, metadata) if metadata["method"] == "infusion" else _unpack(tensors, metadata)
        base = _decode(metadata, "base", list)
        if any(isinstance(value, bool) or not isinstance(value, int | float) for value in base):
            raise ValueError(f"base must be a list of numbers, found {base}")
        training = _decode(metadata, "training", dict)
        return {"noun": metadata["noun"], "base": tuple(map(float, base)), "training": training, **own}
    except (ValueError, SafetensorError) as error:
        raise ConceptFileError(f"{path}: {error}") from error


def _pack_residuals(residuals: Iterable[Tensor], dtype: str) -> dict[str, Tensor]:
    vectors = [residual.detach().cpu().float() for residual in residuals]
    if dtype == "float16":
        return {"residuals": _half("residuals", torch.cat(vectors))}
    scales = torch.stack([vector.abs().max() / 127 for vector in vectors])
    steps = [vector / scale if scale else vector for vector, scale in zip(vectors, scales, strict=True)]
    return {"residuals": torch.cat(steps).round().to(torch.int8), "scales": scales}


def _unpack_residuals(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
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
    return {"residuals": dict(zip(map(_lengthen, layers), vectors, strict=True)), "space": metadata["space"]}


def _unpack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    if len(tensors) > 1 + 4 * _MAX_LAYERS:
        raise ValueError(f"the file must hold at most {1 + 4 * _MAX_LAYERS} tensors, found {len(tensors)}")
    changes, parts = dict[str, tuple[Tensor, ...]](), dict(tensors)
    tokens = parts.pop("tokens", None)
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float16 or tensor.ndim != 2:
            raise ValueError(f"{name} must be a float16 matrix, found {tensor.dtype} of shape {tuple(tensor.shape)}")
    for name in sorted({name.removesuffix(".up").removesuffix(".down") for name in parts}):
        layer, _, projection = name.rpartition(".")
        found = [parts[part] for part in (name, f"{name}.up", f"{name}.down") if part in parts]
        if not layer or projection not in ("to_k", "to_v") or len(found) != (1 if name in parts else 2):
            raise ValueError(
                f"tensors must be tokens, or <layer>.to_k or <layer>.to_v, whole or as .up and .down, found {name!r}"
            )
        changes[f"{_lengthen(layer)}.{projection}"] = tuple(factor.float() for factor in found)
    tokens = None if tokens is None else tokens.float()
    return {"tokens": tokens, "placeholder": metadata["placeholder"], "changes": changes}


def _half(name: str, tensor: Tensor) -> Tensor:
    half = tensor.detach().cpu().half().contiguous()
    if not torch.isfinite(half).all():
        raise ValueError(f"{name} must fit float16 to be saved, got {tensor.abs().max():g}")
    return half


def _read(path: Path) -> tuple[bytes, dict[str, str]]:
    """A whole file and its metadata, read no further than a concept can be long."""
    if path.is_dir():
        raise ValueError("must be a concept file, found a folder")
    try:
        with path.open("rb") as file:
            head = file.read(8 + _MAX_HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
            metadata = _metadata(head, size)
            limit = _MAX_FILE_BYTES[metadata["method"]]
            if size > limit:
                raise ValueError(f"a concept file must be at most {limit} bytes; this one has {size}")
            return head + file.read(), metadata
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error


def _metadata(head: bytes, size: int) -> dict[str, str]:
    """The header's text entries; whether tensors and offsets are sound is for the safetensors library to say."""
    if not head:
        raise ValueError("must be a concept file, found an empty one")
    looks = next((what for start, what in _LOOKS.items() if head.startswith(start)), "")
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or length > size - 8 or length > _MAX_HEADER_BYTES:
        raise ValueError(f"not a whole safetensors file ({size} bytes); it looks {looks or 'truncated'}")
    header = json.loads(head[8 : 8 + length])
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
        raise ValueError("a safetensors file, but not a concept: its metadata has no format 'twinstream-concept'")
    if metadata.get("version") != _VERSION:
        raise ValueError(f"concept file version must be {_VERSION}, found {metadata.get('version')!r}")
    if metadata.get("method") not in _FIELDS:
        raise ValueError(f"method must be one of {', '.join(_FIELDS)}, found {metadata.get('method')!r}")
    fields = _FIELDS[metadata["method"]]
    if missing := [name for name in fields if not isinstance(metadata.get(name), str)]:
        raise ValueError(f"the metadata must have {', '.join(fields)}; missing {', '.join(missing)}")
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
    return re.sub(r"\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.attn2(?=\.to_[kv]$|$)", r"/\1/\2", layer)


def _lengthen(layer: str) -> str:
    return re.sub(r"/(\d+)/(\d+)$", r".attentions.\1.transformer_blocks.\2.attn2", layer)
