"""Bulk runs: a file of rows to a folder of pictures, in process or on Ray, resumable at every picture.

A row is the arguments of one picture. Its key, the hash of what decides the picture, the content of model and files
included, names its file, so that a rerun skips what is there, and a row that is drawn twice after a crash replaces its
file by the same one. A row's own id takes the key's place; its file then counts as drawn whatever else has changed.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import check_integer
from ..files import write_atomically
from ..loading import load
from ..methods.asked import Asked, take_asked
from ..methods.asked_pictures import AskedControl, AskedImagePrompt, NetFiles
from ..methods.concept import Concept
from ..methods.control import load_controlnet
from ..options import make_options
from ..read_picture import read_picture
from ..sampling.arguments import Options
from ..sampling.request import make_request
from .nets import adapter_loader, made
from .row_files import contents_of, digest_of, take_files

Paint = Callable[[Sequence[Sequence["Row"]], Path, Mapping[str, Any]], Iterable[list["Status"]]]
STATUS_FILE = "status.jsonl"
_NAMES = ("id", "prompt", "latents", "control", "image_prompts")  # beside what generate and ``Asked`` take
_OPTIONS = (
    "negative_prompt",
    "steps",
    "guidance_scale",
    "guidance_rescale",
    "sampler",
    "schedule",
    "eta",
    "height",
    "width",
    "seed",
    "weighting",
    "long_prompts",
    "clip_skip",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One picture to draw.

    Attributes:
        key: its file's stem.
        prompt: what to draw.
        options: keywords of ``generate``; seed is always there.
        asked: its customisation.
        latents: whether the final latents are kept too, as ``<key>.npy``.
        control, image_prompts: with files for networks and pictures.
    """

    key: str
    prompt: str
    options: Mapping[str, Any]
    asked: Asked = field(default_factory=Asked)
    latents: bool = False
    control: tuple[AskedControl, ...] = ()
    image_prompts: tuple[AskedImagePrompt, ...] = ()

    def files(self, folder: Path) -> list[Path]:
        """What it leaves, the picture last."""
        return [*([folder / f"{self.key}.npy"] if self.latents else []), folder / f"{self.key}.png"]


@dataclass(frozen=True, slots=True)
class Status:
    """What became of a row.

    Attributes:
        status: "drawn", "there" (from an earlier run) or "error".
        sha256: of the picture's file; "" where there is none.
        error: what was wrong with the row, or "".
        seconds: a drawn picture's share of its batch's time.
    """

    key: str
    status: str
    sha256: str = ""
    error: str = ""
    seconds: float = 0.0


def make_row(given: Mapping[str, Any], model: str, nets: NetFiles | None = None, folder: Path | None = None) -> Row:
    """A row from JSON: prompt and seed, keywords of ``generate`` and of ``methods.asked.Asked``, and perhaps an id.

    Args:
        given: the JSON object.
        model: tells the model from others; see ``loading.model_digest``.
        nets: networks that it may name; others it gives as files.
        folder: which the files of its pictures and networks are relative to.

    Raises:
        ValueError: something is missing or unknown; the message names it.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"a row must be a JSON object, got {given!r}")
    values = dict(given)
    prompt, name, latents = values.pop("prompt", None), values.pop("id", None), values.pop("latents", False)
    if not isinstance(prompt, str):
        raise ValueError(f"prompt must be a text, got {prompt!r}")
    if name is not None and not (isinstance(name, str) and name and set(name) <= _SAFE):
        raise ValueError(f"id must be letters, digits, '-' and '_', got {name!r}")
    asked, (control, prompts) = take_asked(values), take_files(values, nets or NetFiles(), folder or Path())
    for one in values:
        if one not in _OPTIONS:
            known = sorted({*_NAMES, *_OPTIONS, *(f.name for f in fields(Asked))})
            raise ValueError(f"a row has no {one!r}; it has {', '.join(known)}")
    check_integer("seed", values.get("seed"), 0)
    options = [getattr(asked, f.name) for f in fields(Asked)]
    decides = [prompt, values, options, _contents(asked), model, *contents_of(control, prompts)]
    text = json.dumps(decides, sort_keys=True, default=str)
    key = name or hashlib.sha256(text.encode()).hexdigest()[:20]
    return Row(key, prompt, values, asked, bool(latents), control, prompts)


def _contents(asked: Asked) -> list[str]:
    """The hash of each concept's file; "" for what cannot be read, which will be told when it is drawn."""
    return [digest_of(name) for name in asked.concepts if isinstance(name, str)]


_SAFE = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")


def read_rows(path: Path, model: str, nets: NetFiles | None = None) -> tuple[list[Row], list[Status]]:
    """The rows of a JSONL file, and the status of lines that are none; ``model`` and ``nets`` as in ``make_row``.

    Raises:
        ValueError: the file cannot be read, or two rows have one key.
    """
    rows, wrong = dict[str, Row](), list[Status]()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: must be a readable JSONL file: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = make_row(json.loads(line), model, nets, path.parent)
        except ValueError as error:  # JSONDecodeError is one
            wrong.append(Status(f"line-{number}", "error", error=str(error)))
            continue
        if row.key in rows:
            raise ValueError(f"{path}: line {number}: rows must have keys of their own, got {row.key!r} twice")
        rows[row.key] = row
    return list(rows.values()), wrong


class Painter:
    """Draws rows into a folder. On Ray it lives in an actor, and only statuses leave it."""

    def __init__(self, folder: str | Path, loading: Mapping[str, Any], threads: int | None = None) -> None:
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        self.folder, self.sd = Path(folder), load(**loading)
        self.concept = lru_cache(maxsize=64)(Concept.load)
        self.net = lru_cache(maxsize=None)(lambda path: load_controlnet(path, self.sd))
        self.adapter = adapter_loader(self.sd)

    def __call__(self, rows: Sequence[Row]) -> list[Status]:
        """Draw what is not there yet, rows of like options in one call; a row that fails costs the others nothing."""
        found: dict[str, Status] = {}
        waiting: dict[str, list[tuple[Row, dict[str, Any]]]] = {}
        for row in rows:
            if (there := _there(row, self.folder)) is not None:
                found[row.key] = there
                continue
            try:
                own, shared = self._own(row), [_shared(row), *(replace(one, image="") for one in row.control)]
                self._check(row, own)
            except (ValueError, OSError) as error:
                found[row.key] = Status(row.key, "error", error=str(error))
            else:
                waiting.setdefault(json.dumps(shared, sort_keys=True, default=repr), []).append((row, own))
        for group in waiting.values():
            found |= {status.key: status for status in self._draw(group)}
        return [found[row.key] for row in rows]

    def _own(self, row: Row) -> dict[str, Any]:
        """The options of a row that are not text."""
        return {"customization": row.asked.make(self.concept)} | made(
            row.control, row.image_prompts, lambda _, one: self.net(one.net),
            lambda _, one: self.adapter(one.adapter, one.image_encoder or ""),
            lambda _, path: read_picture(path),
        )  # fmt: skip

    def _check(self, row: Row, own: dict[str, Any]) -> None:
        """Refuse a row alone before it could take others with it."""
        make_request(self.sd.limits, row.prompt, make_options(Options, "a row", {**row.options, **own}))

    def _draw(self, group: list[tuple[Row, dict[str, Any]]]) -> list[Status]:
        try:
            return self._draw_together(group)
        except (ValueError, RuntimeError) as error:
            if len(group) == 1:
                return [Status(group[0][0].key, "error", error=str(error))]
        return [status for one in group for status in self._draw([one])]  # which of them it was

    def _draw_together(self, group: list[tuple[Row, dict[str, Any]]]) -> list[Status]:
        start, rows = time.perf_counter(), [row for row, _ in group]
        out = self.sd.generate(
            [row.prompt for row in rows],
            negative_prompt=[row.options.get("negative_prompt", "") for row in rows],
            seed=[row.options["seed"] for row in rows],
            progress=False,
            **_shared(rows[0]),
            **_together([own for _, own in group]),
        )
        hashes = []
        for i, row in enumerate(rows):
            *others, picture = row.files(self.folder)
            for path in others:
                buffer = io.BytesIO()
                np.save(buffer, out.latents[i].half().cpu().numpy())
                write_atomically(path, buffer.getvalue())
            buffer = io.BytesIO()
            out.images[i].save(buffer, format="PNG", pnginfo=out.png_info(i))
            write_atomically(picture, buffer.getvalue())
            hashes.append(_hash(buffer.getvalue()))
        seconds = round((time.perf_counter() - start) / len(rows), 4)
        return [Status(row.key, "drawn", one, "", seconds) for row, one in zip(rows, hashes, strict=True)]


def run_bulk(
    rows: Sequence[Row],
    folder: Path,
    loading: Mapping[str, Any],
    *,
    batch_size: int = 8,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda batches, _n: batches,
    paint: Paint | None = None,
) -> Iterator[Status]:
    """Draw rows into ``folder``, statuses as they come.

    Args:
        rows: with keys of their own; those whose files are there are not drawn again.
        folder: made if need be.
        loading: arguments of ``engine.load``.
        batch_size: rows at a time; those of like options share a batch of the UNet.
        progress: wraps the batches, given how many there are.
        paint: ``paint(batches, folder, loading)`` draws elsewhere, as ``ray_bulk.paint`` does, and gives statuses batch
            by batch; None to draw in this process.
    """
    check_integer("batch_size", batch_size, 1)
    folder.mkdir(parents=True, exist_ok=True)
    there = {row.key: found for row in rows if (found := _there(row, folder)) is not None}
    yield from there.values()
    left = [row for row in rows if row.key not in there]
    batches = [left[first : first + batch_size] for first in range(0, len(left), batch_size)]
    if not batches:
        return
    done = map(Painter(folder, loading), batches) if paint is None else paint(batches, folder, loading)
    for statuses in progress(done, len(batches)):
        yield from statuses


def write_status(folder: Path, statuses: Sequence[Status]) -> Path:
    """All statuses, a JSON line each, in the order of their keys."""
    lines = [
        json.dumps({f.name: getattr(one, f.name) for f in fields(one)})
        for one in sorted(statuses, key=lambda one: one.key)
    ]
    write_atomically(folder / STATUS_FILE, ("\n".join(lines) + "\n").encode())
    return folder / STATUS_FILE


def _there(row: Row, folder: Path) -> Status | None:
    """The status of a row that an earlier run drew, None where it is still to be drawn."""
    files = row.files(folder)
    return Status(row.key, "there", _hash(files[-1].read_bytes())) if all(map(Path.exists, files)) else None


def _shared(row: Row) -> dict[str, Any]:
    """The options that rows of one call have in common."""
    return {name: value for name, value in row.options.items() if name not in ("seed", "negative_prompt")}


def _together(own: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The options of several rows that are not text, as one call has them; their controls differ in hints alone."""
    alike = zip(*(one.get("control", ()) for one in own), strict=True)
    return {
        "customization": [one["customization"] for one in own],
        "control": [replace(same[0], image=[one.image for one in same]) for same in alike],
        "image_prompts": [one.get("image_prompts") for one in own],
    }


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
