"""The jobs of a server by id, and what they drew, kept for a while after they are done."""

from __future__ import annotations

import base64
import io
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

from ...result import Result
from ..queue import Queued

FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}


@dataclass(slots=True, eq=False)
class Entry:
    """A job that was asked for.

    Attributes:
        id: unguessable where the client chose none.
        digest: of what was asked; the same id with another is a mistake.
        step, total: how far it is.
        latents: (4, h, w), the clean ones that the model predicts for its first picture, as of the last step.
        watchers: called after each step, in the scheduler's thread.
        ended: when it was done, by ``time.monotonic``.
        pictures: encoded ones by number, format and whether of the foundation, made when first asked for.
        finish: what is done to a drawn picture before it is encoded; None where nothing is.
    """

    id: str
    digest: str
    step: int = 0
    total: int = 0
    latents: Tensor | None = None
    watchers: list[Callable[[], None]] = field(default_factory=list)
    ended: float | None = None
    pictures: dict[tuple[int, str, bool], bytes] = field(default_factory=dict)
    finish: Callable[[Image.Image], Image.Image] | None = None
    submitted: Queued | None = None

    @property
    def job(self) -> Queued:
        """The scheduler's."""
        assert self.submitted is not None
        return self.submitted

    def on_step(self, step: int, total: int, latents: Tensor) -> None:
        self.step, self.total = step + 1, total
        self.latents = latents[0].clone()
        for watcher in tuple(self.watchers):
            watcher()

    @property
    def status(self) -> str:
        if self.job.done():
            return "cancelled" if self.job.cancelled() else "failed" if self.job.exception() else "done"
        return "drawing" if self.job.running() else "waiting"

    def pictures_base64(self, form: str = "png") -> list[str]:
        """All pictures of a finished job, in base64."""
        return [base64_of(self.picture(i, form)) for i in range(len(self.job.result(0).images))]

    def picture(self, i: int, form: str = "png", foundation: bool = False) -> bytes:
        """A picture of a finished job as the bytes of a file; a PNG holds its settings."""
        key = i, form, foundation
        if key not in self.pictures:
            out: Result = self.job.result(0)
            of = out.foundation_images if foundation else out.images
            if not of or not 0 <= i < len(of) or of[i] is None:
                raise LookupError(f"job {self.id} has no such picture")
            picture = of[i] if self.finish is None else self.finish(of[i])
            self.pictures[key] = encoded(picture, form, None if foundation else out.png_info(i))
        return self.pictures[key]


class Book:
    """Entries by id.

    Args:
        keep_seconds: how long an entry stays after it is done.
        most: entries that are done; the oldest go first.
    """

    def __init__(self, keep_seconds: float, most: int = 256) -> None:
        self.keep_seconds, self.most = keep_seconds, most
        self._entries: dict[str, Entry] = {}
        self._lock = threading.Lock()

    def add(self, name: str | None, digest: str, submit: Callable[[Entry], Queued]) -> Entry:
        """The entry of that id, whose job is ``submit(entry)`` unless it is there: asking twice draws once.

        Raises:
            ValueError: the id is there for something else.
        """
        if name is None:
            entry = _submitted(Entry(uuid.uuid4().hex, digest), submit)
        with self._lock:
            self._forget_old()
            if name is not None and name in self._entries:
                entry = self._entries[name]
                if entry.digest != digest:
                    raise ValueError(f"request_id must be another for another request, got {name!r}")
                return entry
            if name is not None:
                entry = _submitted(Entry(name, digest), submit)
            self._entries[entry.id] = entry
        return entry

    def find(self, name: str) -> Entry:
        with self._lock:
            self._forget_old()
            if name not in self._entries:
                raise LookupError(f"there is no job {name!r}, or it was done too long ago")
            return self._entries[name]

    def unfinished(self) -> list[Entry]:
        with self._lock:
            return [entry for entry in self._entries.values() if not entry.job.done()]

    def _forget_old(self) -> None:
        now = time.monotonic()
        for entry in self._entries.values():
            if entry.job.done() and entry.ended is None:
                entry.ended = now
        done = [entry for entry in self._entries.values() if entry.ended is not None]
        late = {entry.id for entry in done if now - (entry.ended or now) > self.keep_seconds}
        late |= {entry.id for entry in done[: max(0, len(done) - self.most)]}
        self._entries = {name: entry for name, entry in self._entries.items() if name not in late}


def _submitted(entry: Entry, submit: Callable[[Entry], Queued]) -> Entry:
    entry.submitted = submit(entry)
    return entry


def encoded(picture: Image.Image, form: str, info: Any = None) -> bytes:
    buffer = io.BytesIO()
    extra = {"pnginfo": info} if form == "png" else {"quality": 92}
    picture.save(buffer, format=FORMATS[form], **extra)
    return buffer.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def failure(job: Queued) -> BaseException | None:
    """What a finished job failed with; cancelling counts."""
    return CancelledError("the request was cancelled") if job.cancelled() else job.exception()
