"""The files that rows of a bulk run name: networks and pictures, where they lie, and what is in them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..methods.asked_pictures import AskedControl, AskedImagePrompt, NetFiles, encoder_of, read_asked

_READ = (".json", ".safetensors")  # of a folder


def take_files(
    values: dict[str, Any], nets: NetFiles, folder: Path
) -> tuple[tuple[AskedControl, ...], tuple[AskedImagePrompt, ...]]:
    """Take controls and image prompts out of a row, with absolute paths for what it names.

    Args:
        values: of the row.
        nets: networks that have names, relative to the working directory.
        folder: of the file of rows, which all other paths are relative to.

    Raises:
        ValueError: they are none; the message names the field.
    """
    controls = read_asked("control", AskedControl, values.pop("control", None))
    for i, one in enumerate(controls):
        if not isinstance(one.image, str):
            raise ValueError(f"control[{i}].image must be one picture's file, as a row draws one picture, got several")
    prompts = read_asked("image_prompts", AskedImagePrompt, values.pop("image_prompts", None))
    return (
        tuple(
            replace(one, net=_path(nets.controls, one.net, folder), image=_paths(one.image, folder)) for one in controls
        ),
        tuple(
            replace(_with_encoder(f"image_prompts[{i}]", one, nets, folder), image=_paths(one.image, folder))
            for i, one in enumerate(prompts)
        ),
    )


def contents_of(controls: Sequence[AskedControl], prompts: Sequence[AskedImagePrompt]) -> list[Any]:
    """What of controls and image prompts decides a picture: files by their content; nothing where there are none."""
    if not controls and not prompts:
        return []
    return [
        [asdict(one) | {"net": digest_of(one.net), "image": _digests(one.image)} for one in controls],
        [
            asdict(one)
            | {"adapter": digest_of(one.adapter), "image_encoder": digest_of(one.image_encoder or "")}
            | {"image": _digests(one.image)}
            for one in prompts
        ],
    ]


def digest_of(path: str) -> str:
    """SHA-256 of a file, or of a folder's configurations and weights and their names.

    It is "" for what cannot be read, which will be told when it is drawn.
    """
    whole = Path(path)
    if whole.is_dir():
        files = [file for file in sorted(whole.rglob("*")) if file.suffix in _READ and file.is_file()]
        parts = [f"{file.relative_to(whole).as_posix()}:{_digest(file, *_stamp(file))}" for file in files]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return _digest(whole, *_stamp(whole)) if whole.is_file() else ""


def _digests(image: str | Sequence[str]) -> list[str]:
    return [digest_of(one) for one in ([image] if isinstance(image, str) else image)]


def _stamp(file: Path) -> tuple[int, int]:
    """Changes with what is in a file."""
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=4096)
def _digest(file: Path, _changed_ns: int, _size: int) -> str:
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def _with_encoder(where: str, one: AskedImagePrompt, nets: NetFiles, folder: Path) -> AskedImagePrompt:
    if one.adapter in nets.adapters:
        if one.image_encoder is not None:
            rule = f"{where}.image_encoder belongs to an adapter's file; {one.adapter!r} is named with its own"
            raise ValueError(f"{rule}, got {one.image_encoder!r}")
        file, encoder = (str(Path(path).absolute()) for path in nets.adapters[one.adapter])
        return replace(one, adapter=file, image_encoder=encoder)
    file = _paths(one.adapter, folder)
    given = None if one.image_encoder is None else _paths(one.image_encoder, folder)
    return replace(one, adapter=file, image_encoder=encoder_of(file, given))


def _path(named: Any, name: str, folder: Path) -> str:
    return str(Path(named[name]).absolute()) if name in named else _paths(name, folder)


def _paths(names: Any, folder: Path) -> Any:
    """A path, or several, made absolute."""
    if isinstance(names, str):
        return str((folder / names).absolute())
    return tuple(str((folder / name).absolute()) for name in names)
