"""Larger pictures in two passes: drawn in one size, enlarged, and redrawn from there as from an image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from PIL import Image

from .result import Result
from .sampling.arguments import DEFAULT_UPSCALE_STRENGTH, Options
from .sampling.request import Request, make_request

if TYPE_CHECKING:
    from .engine import Engine

_ONE_PASS: dict[str, Any] = {"upscale": 1.0, "upscale_strength": DEFAULT_UPSCALE_STRENGTH, "upscale_steps": None}
_OBSERVED: dict[str, Any] = {"attention_words": (), "record_masks": False}  # in the second pass, whose size they have


def drawer_of(asked: Options) -> Any:
    """Who draws instead of the Engine itself: two passes, or a scheduler; None where nobody does."""
    return TwoPasses(asked) if asked.upscale != 1 else asked.scheduler


@dataclass(frozen=True, slots=True)
class TwoPasses:
    """A picture in the size that was asked for, and image-to-image on its enlargement.

    The picture is decoded, resampled with Lanczos' filter and encoded again. Both passes have the same prompts, seeds,
    customisations and sampler; what is recorded is recorded in the second. Sizes are rounded to the VAE's factor.
    """

    asked: Options

    def draw(self, sd: Engine, prompt: str | Sequence[str], options: dict[str, Any]) -> Result:
        """What ``generate`` returns: pictures, latents and foundations of the second pass, settings as they were asked.

        Raises:
            ValueError: an argument of either pass cannot be honoured; told before the first begins.
        """
        first = make_request(sd.limits, prompt, replace(self.asked, **_ONE_PASS, **_OBSERVED, output="pil"))
        crops = first.masked.crops if first.masked is not None else ()
        stand_ins = [crop.picture for crop in crops] or [Image.new("RGB", (1, 1))]
        second = make_request(sd.limits, prompt, self._second(sd, first, stand_ins))
        given: dict[str, Any] = options | _ONE_PASS
        if not first.generators:
            given["seed"] = list(first.seeds)
        if first.variation_seeds:
            given["variation_seed"] = list(first.variation_seeds)
        steps = [len(sd.timetables.of(request)) for request in (first, second)]
        shown = {"output": "pil", "callback": self._counting(0, sum(steps))}
        drawn = sd.generate(prompt, **given | _OBSERVED | shown)
        if drawn.cancelled:
            return replace(drawn, settings=self._settings(drawn))
        asked = self._second(sd, first, drawn.images)
        names = ("image", "latents", "strength", "steps", "height", "width")
        again = {name: getattr(asked, name) for name in names} | {"callback": self._counting(steps[0], sum(steps))}
        out = sd.generate(prompt, **given | again)
        timings = dict(Counter(drawn.timings) + Counter(out.timings))
        return replace(out, settings=self._settings(drawn), timings=timings)

    def _second(self, sd: Engine, first: Request, images: list[Image.Image]) -> Options:
        factor, (height, width) = sd.limits.factor, first.size
        return replace(
            self.asked,
            **_ONE_PASS,
            image=images,
            latents=None,
            strength=self.asked.upscale_strength,
            steps=self.asked.upscale_steps or self.asked.steps,
            height=round(height * self.asked.upscale / factor) * factor,
            width=round(width * self.asked.upscale / factor) * factor,
        )

    def _counting(self, before: int, total: int) -> Any:
        """The caller's callback, which counts over both passes."""
        callback = self.asked.callback
        return None if callback is None else lambda i, _total, latents: callback(before + i, total, latents)

    def _settings(self, first: Result) -> dict[str, Any]:
        return first.settings | {name: getattr(self.asked, name) for name in _ONE_PASS}
