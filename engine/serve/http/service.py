"""What all interfaces of the server share: how a request is checked, drawn, watched and given up."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from starlette.requests import Request

from ...methods.asked import take_asked
from ...methods.asked_pictures import AskedControl, AskedImagePrompt, read_asked
from ...models.tiny_vae import DecoderTiny
from ...result import Result
from ..fleet import Fleet
from ..nets import Nets
from ..queue import Queued
from ..scheduler import Scheduler
from .book import Book, Entry, failure
from .decode import MaskReader, as_it_is, decoded
from .hints import fit_hints
from .outside import Covering, keep_outside
from .previews import Previews
from .shelf import Shelf

_FOLD = 16  # as many pixels as are drawn may be sent, since pictures are made smaller
_LOOK_EVERY = 0.25  # seconds after which a client that waits is asked whether it is still there
# what JSON can say of the options; the others are tensors, functions, or of the server
OVER_HTTP = (
    "negative_prompt", "steps", "guidance_scale", "sampler", "eta", "height", "width", "seed", "images_per_prompt",
    "strength", "weighting", "schedule", "guidance_rescale", "vae_slicing", "vae_tiling", "mask_blur", "mask_padding",
    "long_prompts", "clip_skip", "variation_seed", "variation_strength",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a client may ask for.

    Attributes:
        images, steps: of one request.
        pixels: of one picture.
        request_pixels: of all pictures of a request.
        controls: ControlNets of one request.
        prompt_pictures: of one request's image prompts.
        body_bytes: of a request's body.
        keep_seconds: for which results stay.
    """

    images: int = 10
    steps: int = 200
    pixels: int = 1024 * 1024
    request_pixels: int = 4 * 1024 * 1024
    controls: int = 4
    prompt_pictures: int = 8
    body_bytes: int = 20_000_000
    keep_seconds: float = 600.0


class GoneError(Exception):
    """The client went away; nobody reads what is answered."""


class Service:
    """One model behind all interfaces.

    Args:
        scheduler: who draws; closed by the application.
        shelf: of concepts.
        limits: of clients.
        decoder: makes previews; the linear map of ``Previews`` where not given.
        nets: that clients may name; none where not given.

    Attributes:
        requests: answers by path and status.
        seconds: that they took, by path.
    """

    def __init__(
        self,
        scheduler: Scheduler | Fleet,
        shelf: Shelf,
        limits: Limits,
        decoder: DecoderTiny | None = None,
        nets: Nets | None = None,
    ) -> None:
        self.nets = Nets(scheduler.sd) if nets is None else nets
        self.scheduler, self.sd, self.shelf, self.limits = scheduler, scheduler.sd, shelf, limits
        self.book, self.previews = Book(limits.keep_seconds), Previews(scheduler.sd.vae, decoder)
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
        mask: str | list[str] | None = None,
        read_mask: MaskReader = as_it_is,
        control: Sequence[Mapping[str, Any]] = (),
        image_prompts: Sequence[Mapping[str, Any]] = (),
        resize_modes: Sequence[str] = (),
        covering: Covering | None = None,
        request_id: str | None = None,
        deadline: float | None = None,
    ) -> Entry:
        """Submit a request, or find it if its id has been before.

        Args:
            prompt: one text or several.
            given: options of ``generate`` that are in ``OVER_HTTP``, and of ``methods.asked.Asked``, concepts by name.
            client: between whom steps are shared.
            image: base64 of the picture(s) to start from.
            mask: likewise, of what says what of them to redraw; ``read_mask`` makes masks of it, or None where it says
                nothing.
            control, image_prompts: what ``AskedControl`` and ``AskedImagePrompt`` have, networks by name, pictures in
                base64.
            resize_modes: how hints are brought to the size that is drawn, one per control, as ``fit_hints`` says; where
                none are given, as ``generate`` does it.
            covering: keeps the picture outside the mask to the bit, see ``keep_outside``; None leaves what is drawn.
            request_id, deadline: see ``Book.add`` and ``Scheduler.submit``.

        Raises:
            ValueError: something cannot be honoured.
            QueueFullError, DeadlineError: see ``Scheduler.submit``.
        """
        nets = [dict(one) for one in control], [dict(one) for one in image_prompts]
        decides = json.dumps([prompt, dict(given), image, mask, *nets], sort_keys=True)
        digest = hashlib.sha256(decides.encode()).hexdigest()

        def submit(entry: Entry) -> Queued:
            values = dict(given)
            asked = take_asked(values)
            n_images = self._check_limits(prompt, values)
            pictures = self._decoded("image", image)
            of_masks = pictures if mask is image else self._decoded("mask", mask)
            masks = [read for one in of_masks if (read := read_mask(one)) is not None]
            for name, given_ones in (("image", pictures), ("mask", masks)):
                if given_ones:
                    values[name] = given_ones[0] if len(given_ones) == 1 else given_ones
            self._check_pasted(pictures, n_images, values)
            values |= self._nets(*nets, n_images)
            if resize_modes:
                values["control"] = fit_hints(self.sd.limits, prompt, values, resize_modes)
            if covering is not None and masks and values.get("mask_padding") is None:
                entry.finish = keep_outside(pictures[0], masks[0], values.get("mask_blur", 0.0), covering)
            custom = asked.make(self.shelf.load)
            watched = {"callback": entry.on_step, "callback_latents": "clean"}
            return self.scheduler.submit(
                prompt, client=client, deadline=deadline, customization=custom, **watched, **values
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

    def _decoded(self, name: str, given: str | list[str] | None) -> list[Image.Image]:
        return [decoded(name, one, self.limits.pixels) for one in ([given] if isinstance(given, str) else given or ())]

    def _nets(self, control: Sequence[Any], image_prompts: Sequence[Any], n_images: int) -> dict[str, Any]:
        """The options of ``generate`` with networks, which are asked for by name."""
        limits = self.limits
        controls = read_asked("control", AskedControl, control)
        prompts = read_asked("image_prompts", AskedImagePrompt, image_prompts)
        for name, count, most in (
            ("networks of control", len(controls), limits.controls),
            ("pictures of a control", max((_count(one.image) for one in controls), default=0), n_images),
            ("pictures of image_prompts", sum(_count(one.image) for one in prompts), limits.prompt_pictures),
        ):
            if count > most:
                raise ValueError(f"{name} must be at most {most} here, got {count}")
        pixels, most = 0, _FOLD * limits.request_pixels

        def read(name: str, text: str) -> Image.Image:
            nonlocal pixels
            picture = decoded(name, text, limits.pixels)
            pixels += picture.width * picture.height
            if pixels > most:
                rule = f"pixels of all pictures of control and image_prompts must be at most {most} on this server"
                raise ValueError(f"{rule}, got more with {name}")
            return picture

        return self.nets.make(controls, prompts, read)

    def _check_pasted(self, pictures: list[Image.Image], n_images: int, values: Mapping[str, Any]) -> None:
        """Pictures that are pasted into keep their size, which no other limit knows."""
        if values.get("mask_padding") is None:
            return
        most = 4 * self.limits.request_pixels
        pixels = max((picture.width * picture.height for picture in pictures), default=0) * n_images
        if pixels > most:
            raise ValueError(f"pixels of all pictures pasted into must be at most {most} on this server, got {pixels}")

    def _check_limits(self, prompt: str | list[str], values: Mapping[str, Any]) -> int:
        """Refuse what is too large; returns how many images are asked for."""
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
        return n_images


def _count(pictures: str | Sequence[str]) -> int:
    return 1 if isinstance(pictures, str) else len(pictures)


def _number(value: Any, otherwise: int) -> int:
    """A number that is given as one; what is none is refused by ``generate``."""
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise
