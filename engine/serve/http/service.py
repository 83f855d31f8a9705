"""What all interfaces of the server share: how a request is checked, drawn, watched and given up."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import io
import json
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image, UnidentifiedImageError
from starlette.requests import Request

from ...methods.asked import take_asked
from ...observe.progress import Callback
from ...result import Result
from ..fleet import Fleet
from ..queue import Queued
from ..scheduler import Scheduler
from .book import Book, Entry, failure
from .previews import Previews
from .shelf import Shelf

_LOOK_EVERY = 0.25  # seconds after which a client that waits is asked whether it is still there
# what JSON can say of the options; the others are tensors, functions, or of the server
OVER_HTTP = (
    "negative_prompt", "steps", "guidance_scale", "sampler", "eta", "height", "width", "seed", "images_per_prompt",
    "strength", "weighting", "schedule", "guidance_rescale", "vae_slicing", "vae_tiling",
    "variation_seed", "variation_strength",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a client may ask for.

    Attributes:
        images, steps: of one request.
        pixels: of one picture.
        request_pixels: of all pictures of a request.
        body_bytes: of a request's body.
        keep_seconds: for which results stay.
    """

    images: int = 10
    steps: int = 200
    pixels: int = 1024 * 1024
    request_pixels: int = 4 * 1024 * 1024
    body_bytes: int = 20_000_000
    keep_seconds: float = 600.0


class GoneError(Exception):
    """The client went away; nobody reads what is answered."""


class Service:
    """One model behind all interfaces.

    Attributes:
        requests: answers by path and status.
        seconds: that they took, by path.
    """

    def __init__(self, scheduler: Scheduler | Fleet, shelf: Shelf, limits: Limits) -> None:
        self.scheduler, self.sd, self.shelf, self.limits = scheduler, scheduler.sd, shelf, limits
        self.book, self.previews = Book(limits.keep_seconds), Previews(scheduler.sd.vae)
        self.started = time.time()
        self.requests: Counter[tuple[str, int]] = Counter()
        self.seconds = defaultdict[str, float](float)

    @property
    def model_name(self) -> str:
        """As clients know it: the last part of what it was loaded from."""
        return self.sd.name.rstrip("/").rsplit("/", 1)[-1]

    async def start(
        self,
        prompt: str | list[str],
        given: Mapping[str, Any],
        *,
        client: str,
        image: str | list[str] | None = None,
        request_id: str | None = None,
        deadline: float | None = None,
    ) -> Entry:
        """Submit a request, or find it if its id has been before.

        Args:
            prompt: one text or several.
            given: options of ``generate`` that are in ``OVER_HTTP``, and of ``methods.asked.Asked``, concepts by name.
            client: between whom steps are shared.
            image: base64 of the picture(s) to start from.
            request_id, deadline: see ``Book.add`` and ``Scheduler.submit``.

        Raises:
            ValueError: something cannot be honoured.
            QueueFullError, DeadlineError: see ``Scheduler.submit``.
        """
        decides = json.dumps([prompt, dict(given), image], sort_keys=True)
        digest = hashlib.sha256(decides.encode()).hexdigest()

        def submit(on_step: Callback) -> Queued:
            values = dict(given)
            asked = take_asked(values)
            self._check_limits(prompt, values)
            if image is not None:
                pictures = [_decoded(one, self.limits.pixels) for one in ([image] if isinstance(image, str) else image)]
                values["image"] = pictures[0] if len(pictures) == 1 else pictures
            custom = asked.make(self.shelf.load)
            return self.scheduler.submit(
                prompt, client=client, deadline=deadline, customization=custom, callback=on_step, **values
            )

        return await asyncio.to_thread(self.book.add, request_id, digest, submit)

    async def result(self, request: Request, entry: Entry) -> Result:
        """Wait for a job; if its client goes away, it is cancelled.

        Raises:
            Exception: what the job failed with.
        """
        waiting = asyncio.wrap_future(entry.job)
        try:
            while True:
                done, _ = await asyncio.wait({waiting}, timeout=_LOOK_EVERY)
                if done:
                    break
                if await request.is_disconnected():
                    raise GoneError
        finally:
            if not entry.job.done():
                entry.job.cancel()
        error = failure(entry.job)
        if error is not None:
            raise error
        return entry.job.result(0)

    async def watch(self, entry: Entry, cancel: bool = True) -> AsyncIterator[int]:
        """The step after every step, and 0 while nothing happens, until the job is done.

        Args:
            cancel: whether the job ends with who watches it.
        """
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            loop.call_soon_threadsafe(news.set)

        entry.watchers.append(tell)
        entry.job.add_done_callback(lambda _: loop.is_closed() or tell())
        try:
            while not entry.job.done():
                before = entry.step
                try:
                    await asyncio.wait_for(news.wait(), 1.0)
                except asyncio.TimeoutError:
                    yield 0
                news.clear()
                if entry.step != before:
                    yield entry.step
        finally:
            entry.watchers.remove(tell)
            if cancel and not entry.job.done():
                entry.job.cancel()

    def _check_limits(self, prompt: str | list[str], values: Mapping[str, Any]) -> None:
        limits, sd = self.limits, self.sd.limits
        prompts = 1 if isinstance(prompt, str) else len(prompt)
        n_images = prompts * _number(values.get("images_per_prompt"), 1)
        side = sd.sample_size * sd.factor
        pixels = _number(values.get("height"), side) * _number(values.get("width"), side)
        for name, value, most in (
            ("images of a request", n_images, limits.images),
            ("steps", _number(values.get("steps"), 0), limits.steps),
            ("pixels of a picture", pixels, limits.pixels),
            ("pixels of a request", pixels * n_images, limits.request_pixels),
        ):
            if value > most:
                raise ValueError(f"{name} must be at most {most} on this server, got {value}")


def _number(value: Any, otherwise: int) -> int:
    """A number that is given as one; what is none is refused by ``generate``."""
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise


def _decoded(text: str, most_pixels: int) -> Image.Image:
    """A picture from base64, which may be a data URL; nothing is fetched, and no bomb is unpacked."""
    head, _, tail = text.partition(",")
    try:
        data = base64.b64decode(tail if head.startswith("data:") else text, validate=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP", "GIF", "BMP"))
            if picture.width * picture.height > 16 * most_pixels:
                size = f"{picture.width}x{picture.height}"
                raise ValueError(f"image must have at most {16 * most_pixels} pixels on this server, got {size}")
            picture.load()
    except binascii.Error as error:
        raise ValueError(f"image must be a picture in base64: {error}") from error
    except (
        UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning,
    ) as error:  # fmt: skip
        raise ValueError(f"image must be a PNG, JPEG, WebP, GIF or BMP file: {error}") from error
    return picture
