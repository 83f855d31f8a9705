"""Settings out of pictures: what ``Result.save`` or A1111 wrote into a PNG, as arguments of ``generate``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from .methods.dci import DCI
from .result import A1111_SAMPLERS, A1111_SCHEDULES
from .sampling.arguments import Options
from .warn import warn

_ARGUMENTS = {"prompt", *(one.name for one in fields(Options))}
_IN_JSON = [one.name for one in fields(Options) if one.metadata["setting"]]
_SAMPLERS = {label.lower(): ours for ours, label in A1111_SAMPLERS.items()}
_SCHEDULES: dict[str, str | None] = {label.lower(): ours for ours, label in A1111_SCHEDULES.items()} | {"uniform": None}
# what A1111's schedule type "Automatic" is, by sampler; the model's own for all others
_AUTOMATIC = {"dpmpp_2m": "karras", "dpmpp_sde": "karras", "dpmpp_2m_sde": "exponential", "dpm2": "karras"}
_OF_ITS_MAKER = ("model", "model hash", "version")  # who drew it, which no argument of generate says
_PAIR = re.compile(r'\s*([\w][\w \-/.]*?):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
_LORA = re.compile(r"<(?:lora|lyco|hypernet):[^>]*>")


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that a picture was drawn with.

    Settings that are not arguments of ``generate``, or that the file does not hold, such as concepts, LoRAs and the
    picture an image began with, are named in a warning. Read are this package's own PNGs, and A1111's ``parameters``.

    Args:
        path: a PNG that ``Result.save``, ``twinstream``, A1111 or a program that writes as it does has saved.

    Returns:
        Arguments of ``generate``, its prompt among them: ``sd.generate(**engine.read_settings(path))``.

    Raises:
        ValueError: it cannot be read as a picture, or holds no settings.
    """
    try:
        with Image.open(path) as picture:
            picture.load()  # text may stand behind the pixels
            text: dict[Any, Any] = getattr(picture, "text", None) or picture.info
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as a picture: {error}") from error
    if isinstance(own := text.get("twinstream"), str):
        found = _from_json(own, str(path))
    elif isinstance(parameters := text.get("parameters"), str):
        found = _from_parameters(parameters)
    else:
        raise ValueError(
            f"{path}: must hold settings as PNG text, twinstream or parameters, got {sorted(map(str, text))}"
        )
    for name in [name for name in found.arguments if name not in _ARGUMENTS]:
        found.unread.append(f"{name}: {found.arguments.pop(name)!r}")
    if found.unread:
        warn(f"{path}: its picture was drawn with more than generate is given here: {'; '.join(found.unread)}")
    return found.arguments


@dataclass(slots=True)
class _Found:
    """Arguments of ``generate``, and what was read beside them."""

    arguments: dict[str, Any] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)


def _from_json(text: str, path: str) -> _Found:
    """This package's own."""
    try:
        settings = json.loads(text)
        names = ("prompt", "negative_prompt", "seed")
        found = _Found({name: settings.pop(name) for name in names})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: its twinstream text must be settings as JSON: {error!r}") from error
    for name in [name for name in _IN_JSON if name in settings]:
        if (value := settings.pop(name)) is not None:
            found.arguments[name] = value
    if (variation := settings.pop("variation_seed", None)) is not None:
        found.arguments["variation_seed"] = variation
    if (strength := settings.pop("strength", None)) is not None:
        found.arguments["strength"] = strength
        found.unread.append("the image it began with, which strength goes with")
    for given, what in (("given_latents", "latents it began with"), ("given_generators", "generators of its noise")):
        if settings.pop(given, False):
            found.unread.append(what)
    if (custom := settings.pop("customization", None)) is not None:
        _read_customization(custom, found)
    if loras := settings.pop("loras", None):
        found.unread.append(f"LoRAs {', '.join(str(lora.get('name')) for lora in loras)}")
    for known, network, what in (("control", "name", "ControlNets"), ("image_prompts", "adapter", "image prompts of")):
        if given := settings.pop(known, None):
            names = ", ".join(str(one.get(network)) for one in given)
            found.unread.append(f"{what} {names}, with their pictures")
    for known in ("model", "device", "dtype", "backend"):
        settings.pop(known, None)
    found.unread += [f"{name}: {value!r}" for name, value in settings.items() if value]
    return found


def _read_customization(custom: dict[str, Any], found: _Found) -> None:
    """DCI on a noun alone, which needs no file; what needs concepts is told."""
    if custom.get("method") == "dci" and not custom.get("concepts"):
        names = ("auxiliary_noun", "strength", "token_scale", "space_scale", "gain", "fraction", "preset", "guidance")
        names += ("noise", "masked", "separate_prompts", "last_layer_only")
        given: dict[str, Any] = {name: custom[name] for name in names if name in custom}  # steps tell of match_cost
        found.arguments["customization"] = DCI(custom.get("noun", ""), **given)
        return
    concepts = [one if isinstance(one, str) else one.get("name") for one in custom.get("concepts", ())]
    found.unread.append(f"{custom.get('method')} of the concepts {', '.join(map(str, concepts))}")


def _from_parameters(text: str) -> _Found:
    """A1111's: the prompt, the negative prompt, and a line of settings that begins with its steps."""
    lines = text.splitlines()
    at = max((i for i, line in enumerate(lines) if re.match(r"\s*Steps:\s*\d", line)), default=len(lines))
    prompts, settings, rest = lines[:at], lines[at : at + 1], lines[at + 1 :]
    negative = next((i for i, line in enumerate(prompts) if line.startswith("Negative prompt:")), len(prompts))
    found = _Found({"prompt": "\n".join(prompts[:negative]).strip()})
    if prompts[negative:]:
        found.arguments["negative_prompt"] = "\n".join(prompts[negative:]).removeprefix("Negative prompt:").strip()
    for name in ("prompt", "negative_prompt"):
        loras = _LORA.findall(found.arguments.get(name, ""))
        if loras:
            found.arguments[name] = _LORA.sub("", found.arguments[name]).strip()
            found.unread += loras
    _read_pairs(dict(_pairs(settings[0] if settings else "")), found)
    found.unread += [line.strip() for line in rest if line.strip()]
    return found


def _pairs(line: str) -> Iterator[tuple[str, str]]:
    for match in _PAIR.finditer(line):
        value = match.group(2).strip()
        if value.startswith('"'):
            try:
                value = str(json.loads(value))
            except ValueError:
                value = value.strip('"')
        yield match.group(1).strip().lower(), value


def _read_pairs(pairs: dict[str, str], found: _Found) -> None:
    """Translate; a value that is no number where one belongs is told with its name, as an unknown name is."""
    for name in _OF_ITS_MAKER:
        pairs.pop(name, None)
    _read_sampler(pairs, found)
    for name, (ours, read) in _NUMBERS.items():
        if name in pairs:
            value = pairs.pop(name)
            try:
                found.arguments[ours] = read(value)
            except ValueError:
                found.unread.append(f"{name}: {value}")
    if size := re.fullmatch(r"(\d+)\s*x\s*(\d+)", pairs.get("size", "")):
        del pairs["size"]
        found.arguments["width"], found.arguments["height"] = int(size[1]), int(size[2])
    if found.arguments.get("clip_skip") == 0:
        del found.arguments["clip_skip"]
    _read_second_pass(pairs, found)
    found.unread += [f"{name}: {value}" for name, value in pairs.items()]


_NUMBERS: dict[str, tuple[str, Any]] = {
    "steps": ("steps", int),
    "cfg scale": ("guidance_scale", float),
    "seed": ("seed", int),
    "clip skip": ("clip_skip", lambda text: int(text) - 1),  # A1111 counts the last layer too
    "variation seed": ("variation_seed", int),
    "variation seed strength": ("variation_strength", float),
    "eta ddim": ("eta", float),
}


def _read_sampler(pairs: dict[str, str], found: _Found) -> None:
    """A sampler's name may end in its schedule's, as it did before A1111 1.9."""
    given, kind = pairs.pop("sampler", None), pairs.pop("schedule type", None)
    if given is None:
        return
    label, schedule = given.lower(), kind.lower() if kind else None
    if label not in _SAMPLERS:
        for ending in _SCHEDULES:
            if label.endswith(f" {ending}"):
                label, schedule = label.removesuffix(f" {ending}"), schedule or ending
    ours = _SAMPLERS.get(label)
    if ours is None:
        found.unread.append(f"sampler: {given}")
    else:
        found.arguments["sampler"] = ours
    if schedule == "automatic":
        schedule = _AUTOMATIC.get(ours or "")
        if schedule is not None:
            found.arguments["schedule"] = schedule
    elif schedule in _SCHEDULES:
        if _SCHEDULES[schedule] is not None:
            found.arguments["schedule"] = _SCHEDULES[schedule]
    elif schedule is not None:
        found.unread.append(f"schedule type: {kind}")


def _read_second_pass(pairs: dict[str, str], found: _Found) -> None:
    """Denoising strength is the second pass's where there is one, whose steps are counted as those taken."""
    names = ("hires upscale", "hires steps", "hires denoising strength", "denoising strength")
    try:
        scale, steps, second, share = (float(pairs[name]) if name in pairs else None for name in names)
    except ValueError:
        return  # all of them stay among the unread
    for name in names:
        pairs.pop(name, None)
    if scale is not None and scale != 1:
        strength = next((one for one in (second, share) if one is not None), None)
        found.arguments["upscale"] = scale
        if strength:
            found.arguments["upscale_strength"] = strength
            taken = steps or found.arguments.get("steps")
            if taken:
                found.arguments["upscale_steps"] = math.ceil(round(taken / strength, 9))
        if (upscaler := pairs.pop("hires upscaler", None)) not in (None, "Lanczos"):
            found.unread.append(f"hires upscaler: {upscaler}")
        share = share if second is not None else None
    if share is not None:
        found.arguments["strength"] = share
        found.unread.append("the image it began with, which strength goes with")
