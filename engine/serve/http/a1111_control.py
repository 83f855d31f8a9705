"""A1111's ControlNet extension: units of ``alwayson_scripts``, and the paths under ``/controlnet`` that clients ask.

A unit's hint is made by the client: preprocessors ("modules") are refused by name, and so is what a unit may have that
would change the picture otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter

from ...checks import check_flag, check_number
from .errors import ERRORS
from .hints import CROP, FILL, STRETCH
from .service import Service

SCRIPT = "controlnet"
_API_VERSION = 3  # whose units this is

_BALANCED, _PROMPT, _CONTROL = "Balanced", "My prompt is more important", "ControlNet is more important"
_MODES: dict[Any, str] = {0: _BALANCED, 1: _PROMPT, 2: _CONTROL} | {one: one for one in (_BALANCED, _PROMPT, _CONTROL)}
_RESIZE: dict[Any, str] = {0: STRETCH, 1: CROP, 2: FILL} | {one: one for one in (STRETCH, CROP, FILL)}
_RESIZE |= {"Scale to Fit (Inner Fit)": CROP, "Envelope (Outer Fit)": FILL}  # as they were called
# fields that are not honoured, and the values of each that ask for nothing; what matters to preprocessors alone
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "module": ("none", "None", "", None),
    "mask": (None, ""),
    "mask_image": (None, ""),
    "effective_region_mask": (None, ""),
    "advanced_weighting": (None, []),
    "ipadapter_input": (None, []),
    "input_mode": ("simple", None),
    "hr_option": ("Both", None),
    "batch_images": (None, "", []),
    "loopback": (False, None),
    "union_control_type": ("Unknown", None),
    "guessmode": (None, False),
}
_MOOT = frozenset((
    "low_vram", "lowvram", "processor_res", "threshold_a", "threshold_b", "pixel_perfect", "save_detected_map",
    "inpaint_crop_input_image", "pulid_mode", "is_ui", "use_preview_as_input", "output_dir",
))  # fmt: skip
_NUMBERS = (  # theirs, ours, and the range
    ("weight", "weight", -100.0, 100.0),
    ("guidance_start", "start", 0.0, 1.0),
    ("guidance_end", "end", 0.0, 1.0),
)
_HASH = re.compile(r" \[[0-9a-fA-F]+\]$")
_HONOURED = ("enabled", "image", "input_image", "model", "weight", "guidance_start", "guidance_end", "control_mode")


@dataclass(frozen=True, slots=True)
class Units:
    """What a request's units ask for.

    Attributes:
        control: as ``AskedControl`` has it.
        resize_modes: one per control.
    """

    control: list[dict[str, Any]]
    resize_modes: list[str]


def take_units(scripts: dict[str, Any], init_image: str | None, nets: Sequence[str]) -> Units:
    """Take the units out of a request's scripts, and leave the others.

    Args:
        scripts: ``alwayson_scripts``.
        init_image: what a unit without a picture is told by.
        nets: names that units may give as their model, also with a hash behind them.

    Raises:
        ValueError: a unit cannot be honoured.
        LookupError: its model is none of these.
    """
    units = Units([], [])
    for name in [name for name in scripts if name.lower() == SCRIPT]:
        given = scripts.pop(name)
        entries = given.get("args") if isinstance(given, Mapping) else given
        if not isinstance(entries, list):
            raise ValueError(f"alwayson_scripts.{name}.args must be a list of units, got {entries!r:.80}")
        for i, unit in enumerate(entries):
            _take_unit(f"alwayson_scripts.{name}.args[{i}]", unit, init_image, nets, units)
    return units


def _take_unit(where: str, unit: Any, init_image: str | None, nets: Sequence[str], units: Units) -> None:
    if not isinstance(unit, Mapping):
        raise ValueError(f"{where} must be a unit, an object, got {unit!r:.80}")
    if not check_flag(f"{where}.enabled", unit.get("enabled", True)):
        return
    _check_fields(where, unit)
    mode = _known(f"{where}.control_mode", _MODES, unit.get("control_mode", _BALANCED))
    if mode == _PROMPT:
        rule = f"{where}.control_mode must be {_BALANCED!r} or {_CONTROL!r} on this server"
        raise ValueError(f"{rule}, got {_PROMPT!r}")
    resize = _known(f"{where}.resize_mode", _RESIZE, unit.get("resize_mode", CROP))
    image = unit.get("image") or unit.get("input_image")
    if not image:
        if init_image is None:
            raise ValueError(f"{where}.image must be a picture in base64, got {image!r}")
        image, resize = init_image, STRETCH
    if not isinstance(image, str):
        raise ValueError(f"{where}.image must be one picture in base64, got {image!r:.80}")
    model = _HASH.sub("", str(unit.get("model")))
    if model not in nets:
        rule = f"{where}.model must be one of {', '.join(nets)}" if nets else f"{where}.model: this server has none"
        raise LookupError(f"{rule}, got {unit.get('model')!r:.80}")
    control = {"net": model, "image": image, "guess_mode": mode == _CONTROL}
    for theirs, ours, low, high in _NUMBERS:
        if unit.get(theirs) is not None:
            control[ours] = check_number(f"{where}.{theirs}", unit[theirs], low, high)
    units.control.append(control)
    units.resize_modes.append(resize)


def _check_fields(where: str, unit: Mapping[str, Any]) -> None:
    """Refuse what is not honoured, unless its value asks for nothing."""
    for name, value in unit.items():
        if name in _NEUTRAL:
            if not any(value is one or value == one for one in _NEUTRAL[name]):
                raise ValueError(f"{where}.{name} must be {_NEUTRAL[name][0]!r} on this server, got {value!r:.80}")
        elif name not in _MOOT and name not in (*_HONOURED, "resize_mode"):
            raise ValueError(f"{where} has no {name!r} on this server, got {value!r:.80}")


def _known(where: str, known: Mapping[Any, str], value: Any) -> str:
    """What a value means, which may be a name or a number."""
    if isinstance(value, bool) or not isinstance(value, str | int) or value not in known:
        raise ValueError(f"{where} must be one of {', '.join(dict.fromkeys(known.values()))}, got {value!r:.80}")
    return known[value]


def make_router(service: Service) -> APIRouter:
    router = APIRouter(prefix="/controlnet", responses=ERRORS)

    @router.get("/version")
    async def version() -> dict[str, int]:
        return {"version": _API_VERSION}

    @router.get("/model_list")
    async def model_list() -> dict[str, list[str]]:
        return {"model_list": list(service.nets.controls)}

    @router.get("/module_list")
    async def module_list() -> dict[str, Any]:
        return {"module_list": ["none"], "module_detail": {"none": {"model_free": False, "sliders": []}}}

    @router.get("/settings")
    async def settings() -> dict[str, int]:
        return {"control_net_unit_count": service.limits.controls}

    return router
