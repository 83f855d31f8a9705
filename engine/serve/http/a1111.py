"""A1111's ``/sdapi/v1``, as far as its clients need it to draw.

A field that would change the picture in a way this engine does not know is refused by name, unless its value asks for
nothing.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from ...checks import check_integer
from ...result import A1111_SAMPLERS, A1111_SCHEDULES
from .a1111_control import SCRIPT, take_units
from .decode import black_and_white
from .errors import ERRORS
from .outside import doubled
from .own import preview_of
from .service import Service

# fields that this engine does not honour, and the values of each that ask for nothing
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "enable_hr": (False,),
    "restore_faces": (False, None),
    "tiling": (False, None),
    "styles": ([], None),
    "seed_resize_from_h": (0, -1, None),
    "seed_resize_from_w": (0, -1, None),
    "script_name": ("", None),
    "refiner_checkpoint": ("", "None", None),
    "s_churn": (0, None),
    "s_tmin": (0, None),
    "s_noise": (1, None),
    "resize_mode": (0, None),
    "initial_noise_multiplier": (1, None),
    "mask": ("", None),  # of txt2img
    "image_cfg_scale": (1.5, 1, 0, None),
}
# what matters only together with one of those, or to the server's own files
_MOOT = frozenset((
    "hr_scale", "hr_upscaler", "hr_second_pass_steps", "hr_resize_x", "hr_resize_y", "hr_checkpoint_name",
    "hr_sampler_name", "hr_scheduler", "hr_prompt", "hr_negative_prompt", "hr_cfg", "hr_additional_modules",
    "firstphase_width", "firstphase_height", "s_tmax", "s_min_uncond", "script_args", "refiner_switch_at",
    "do_not_save_samples", "do_not_save_grid", "save_images", "send_images", "override_settings_restore_afterwards",
    "mask_blur", "mask_blur_x", "mask_blur_y", "mask_round", "inpainting_fill", "inpaint_full_res",
    "inpaint_full_res_padding", "inpainting_mask_invert", "include_init_images", "disable_extra_networks",
    "latent_mask", "firstpass_image", "comments", "infotext", "force_task_id", "distilled_cfg_scale",
))  # fmt: skip
_STOP_AT = "CLIP_stop_at_last_layers"
_SCHEDULES: dict[str, str | None] = {"automatic": None, "": None}
_SCHEDULES |= {one.lower(): ours for ours, label in A1111_SCHEDULES.items() for one in (ours, label)}
_SAMPLERS = {name.lower(): ours for ours, name in A1111_SAMPLERS.items()} | {ours: ours for ours in A1111_SAMPLERS}


class Txt2Img(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: str = ""
    negative_prompt: str | None = ""
    seed: int | None = -1
    subseed: int | None = -1
    subseed_strength: float | None = 0
    steps: int | None = 20
    cfg_scale: float | None = 7.0
    width: int | None = None
    height: int | None = None
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    batch_size: int | None = Field(1, ge=1)
    n_iter: int | None = Field(1, ge=1)
    eta: float | None = None
    denoising_strength: float | None = None
    override_settings: dict[str, Any] | None = None
    alwayson_scripts: dict[str, Any] | None = None


class Img2Img(Txt2Img):
    """What concerns masks has A1111's defaults, and means nothing without one."""

    init_images: list[str] = Field(min_length=1, max_length=1)
    mask: str | None = None
    mask_blur: float | None = None
    mask_blur_x: float | None = 4
    mask_blur_y: float | None = 4
    inpaint_full_res: bool | None = True
    inpaint_full_res_padding: int | None = 0
    inpainting_mask_invert: bool | None = False


class NewOptions(BaseModel):
    model_config = ConfigDict(extra="allow")


def make_router(service: Service) -> APIRouter:
    router = APIRouter(prefix="/sdapi/v1", responses=ERRORS)

    async def draw(body: Txt2Img, request: Request) -> dict[str, Any]:
        image, mask, inverted = None, None, False
        if isinstance(body, Img2Img):
            image, mask, inverted = body.init_images[0], body.mask or None, bool(body.inpainting_mask_invert)
        scripts = dict(body.alwayson_scripts or {})
        units = take_units(scripts, image, list(service.nets.controls))
        entry = await service.start(
            body.prompt,
            _options(service, body, scripts),
            client=request.state.client,
            image=image,
            mask=mask,
            read_mask=black_and_white(inverted),
            control=units.control,
            resize_modes=units.resize_modes,
            covering=doubled,
        )
        out = await service.result(request, entry)
        pictures = await asyncio.to_thread(entry.pictures_base64)
        info = {
            "prompt": body.prompt,
            "negative_prompt": body.negative_prompt or "",
            "seed": out.seeds[0],
            "all_seeds": out.seeds,
            "width": out.settings["width"],
            "height": out.settings["height"],
            "steps": out.settings["steps"],
            "cfg_scale": out.settings["guidance_scale"],
            "sampler_name": A1111_SAMPLERS[out.settings["sampler"]],
            "infotexts": [out.parameters(i) for i in range(len(out.images))],
        }
        return {
            "images": pictures,
            "parameters": body.model_dump(exclude={"init_images", "mask", "alwayson_scripts"}),
            "info": json.dumps(info),
        }

    @router.post("/txt2img")
    async def txt2img(body: Txt2Img, request: Request) -> dict[str, Any]:
        return await draw(body, request)

    @router.post("/img2img")
    async def img2img(body: Img2Img, request: Request) -> dict[str, Any]:
        return await draw(body, request)

    @router.get("/progress")
    async def progress(skip_current_image: bool = False) -> dict[str, Any]:
        """Of all that is asked for; the picture is of what is drawn longest."""
        running = service.book.unfinished()
        total = sum(entry.total for entry in running)
        share = sum(entry.step for entry in running) / total if total else 0.0
        first = next((entry for entry in running if entry.latents is not None), None)
        shown = None
        if first is not None and first.latents is not None and not skip_current_image:
            shown = await asyncio.to_thread(preview_of, service, first)
        state = {"job_count": len(running), "sampling_step": max((one.step for one in running), default=0)}
        return {"progress": share, "eta_relative": 0.0, "state": state, "current_image": shown, "textinfo": None}

    @router.post("/interrupt")
    async def interrupt() -> dict[str, Any]:
        """Cancel all that runs, as A1111 does; with tokens, whoever has one may."""
        for entry in service.book.unfinished():
            entry.job.cancel()
        return {}

    @router.get("/samplers")
    async def samplers() -> list[dict[str, Any]]:
        return [{"name": name, "aliases": [ours], "options": {}} for ours, name in A1111_SAMPLERS.items()]

    @router.get("/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        named = {"automatic": "Automatic"} | A1111_SCHEDULES
        return [{"name": name, "label": label} for name, label in named.items()]

    @router.get("/sd-models")
    async def models() -> list[dict[str, Any]]:
        name = service.model_name
        return [{"title": name, "model_name": name, "filename": name, "hash": None, "sha256": None, "config": None}]

    @router.get("/loras")
    async def loras() -> list[dict[str, Any]]:
        return []

    @router.get("/scripts")
    async def scripts() -> dict[str, list[str]]:
        there = [SCRIPT] if service.nets.controls else []
        return {"txt2img": there, "img2img": there}

    @router.get("/options")
    async def options() -> dict[str, Any]:
        return _server_options(service)

    @router.post("/options")
    async def set_options(body: NewOptions) -> dict[str, Any]:
        """Options may be set to what they are."""
        _check_options(service, body.model_extra or {})
        return {}

    return router


def _options(service: Service, body: Txt2Img, scripts: dict[str, Any]) -> dict[str, Any]:
    """Options of ``generate``, from A1111's names; ``scripts`` are those that nobody has taken."""
    for name, value in (body.model_extra or {}).items():
        if name in _NEUTRAL:
            if value not in _NEUTRAL[name]:
                raise ValueError(f"{name} must be {_NEUTRAL[name][0]!r} on this server, got {value!r}")
        elif name not in _MOOT:
            raise ValueError(f"{name} is no field that this server knows, got {value!r}")
    overrides = dict(body.override_settings or {})
    stop_at = overrides.pop(_STOP_AT, 1)
    _check_options(service, overrides)
    if acting := sorted(name for name, given in scripts.items() if _acts(given)):
        raise ValueError(f"alwayson_scripts must be controlnet alone on this server, got {', '.join(acting)}")
    if (body.scheduler or "").lower() not in _SCHEDULES:
        known = ", ".join(["Automatic", *A1111_SCHEDULES.values()])
        raise ValueError(f"scheduler must be one of {known}, got {body.scheduler!r}")
    asked = body.sampler_name or body.sampler_index
    sampler = _SAMPLERS.get((asked or "Euler").lower())
    if sampler is None:
        raise ValueError(f"sampler_name must be one of {', '.join(A1111_SAMPLERS.values())}, got {asked!r}")
    given: dict[str, Any] = {
        "negative_prompt": body.negative_prompt or "",
        "steps": 20 if body.steps is None else body.steps,
        "guidance_scale": 7.0 if body.cfg_scale is None else body.cfg_scale,
        "sampler": sampler,
        "clip_skip": check_integer(_STOP_AT, stop_at, 1) - 1,  # 1 leaves out none
        "images_per_prompt": (body.batch_size or 1) * (body.n_iter or 1),
        "schedule": _SCHEDULES[(body.scheduler or "").lower()],
        "width": body.width,
        "height": body.height,
        **_seeds(body),
    }
    if body.eta is not None and sampler == "ddim":  # elsewhere it changes nothing, or is what the sampler does anyway
        given["eta"] = body.eta
    if sampler == "euler_ancestral" and body.eta not in (None, 1):
        raise ValueError(f"eta must be 1 for Euler a on this server, got {body.eta}")
    if isinstance(body, Img2Img):
        given["strength"] = 0.75 if body.denoising_strength is None else body.denoising_strength
        given |= _of_mask(body) if body.mask else {}
    return {name: value for name, value in given.items() if value is not None}


def _of_mask(body: Img2Img) -> dict[str, Any]:
    more = body.model_extra or {}
    for name, wanted in (("inpainting_fill", 1), ("mask_round", False)):
        if more.get(name, wanted) not in (wanted, None):
            raise ValueError(f"{name} must be {wanted!r} with a mask on this server, got {more[name]!r}")
    blur = body.mask_blur
    if blur is None:
        blur = body.mask_blur_x or 0
        if blur != (body.mask_blur_y or 0):
            got = f"got {body.mask_blur_x} and {body.mask_blur_y}"
            raise ValueError(f"mask_blur_x and mask_blur_y must be alike on this server, {got}")
    return {"mask_blur": blur, "mask_padding": (body.inpaint_full_res_padding or 0) if body.inpaint_full_res else None}


def _seeds(body: Txt2Img) -> dict[str, Any]:
    """Seeds that are not to be drawn."""
    given: dict[str, Any] = {} if body.seed in (None, -1) else {"seed": body.seed}
    if body.subseed_strength:
        given["variation_strength"] = body.subseed_strength
        if body.subseed not in (None, -1):
            given["variation_seed"] = body.subseed
    return given


def _acts(given: Any) -> bool:
    """Whether a script is given anything to do."""
    arguments = given.get("args") if isinstance(given, dict) else given
    return bool(arguments) and arguments != [False]


def _server_options(service: Service) -> dict[str, Any]:
    return {"sd_model_checkpoint": service.model_name, _STOP_AT: 1, "samples_format": "png"}


def _check_options(service: Service, given: dict[str, Any]) -> None:
    known = _server_options(service)
    for name, value in given.items():
        if name not in known or value != known[name]:
            rule = f"must be {known[name]!r} on this server" if name in known else "is no option of this server"
            raise ValueError(f"{name} {rule}, got {value!r}")
