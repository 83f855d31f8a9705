"""OpenAI's Images: ``/v1/images/generations``, ``/v1/images/edits`` and ``/v1/models``.

Fields that OpenAI's models have and this one lacks are taken where they ask for nothing, and refused by name elsewhere.
What this one has beside (steps, seed, concepts ...) is taken too: clients send it as ``extra_body``.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import UploadFile

from ...result import Result
from .book import Entry, base64_of, failure
from .decode import from_transparency, transparency
from .errors import ERRORS, describe
from .outside import as_masked
from .own import event, preview_of
from .service import Service

_MODELS_OWN = (
    "negative_prompt",
    "steps",
    "guidance_scale",
    "sampler",
    "eta",
    "seed",
    "strength",
    "weighting",
    "schedule",
    "mask_blur",
    "mask_padding",
)
_NUMBERS = ("steps", "guidance_scale", "eta", "seed", "strength", "mask_blur", "mask_padding")
_CUSTOM = ("concepts", "foundation", "concept_strength", "dci", "auxiliary_noun", "dci_strength", "dci_fraction")
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # fields that this model cannot honour, and the values that ask for nothing
    "quality": (None, "auto", "standard"),
    "style": (None,),
    "background": (None, "auto", "opaque"),
    "moderation": (None, "auto", "low"),
    "output_compression": (None,),
    "input_fidelity": (None,),
}


class ImagesRequest(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: str
    model: str | None = None
    n: int | None = Field(1, ge=1)
    size: str | None = Field(None, description='"auto", or width x height such as "512x512"')
    response_format: str | None = Field(None, pattern="^(url|b64_json)$")
    output_format: str | None = Field(None, pattern="^(png|jpeg|webp)$")
    stream: bool | None = False
    partial_images: int | None = Field(0, ge=0, le=3)
    user: str | None = None


def make_router(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", responses=ERRORS)

    @router.post("/images/generations")
    async def generations(body: ImagesRequest, request: Request) -> Response:
        return await _draw(service, request, body, None, None)

    @router.post(
        "/images/edits",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "multipart/form-data": {
                        "schema": {
                            "type": "object",
                            "required": ["image", "prompt"],
                            "properties": {
                                "image": {"type": "string", "format": "binary"},
                                "mask": {"type": "string", "format": "binary"},
                                "prompt": {"type": "string"},
                                "n": {"type": "integer", "minimum": 1},
                                "size": {"type": "string"},
                                "response_format": {"type": "string", "enum": ["url", "b64_json"]},
                            },
                        }
                    }
                },
            }
        },
    )
    async def edits(request: Request) -> Response:
        """Draw from a picture, or where the mask is transparent; ``strength`` says how far that is redrawn."""
        values: dict[str, Any] = {}
        pictures: dict[str, list[str]] = {"image": [], "mask": []}
        async with request.form(max_files=4, max_fields=64, max_part_size=service.limits.body_bytes) as form:
            for name, value in form.multi_items():
                plain = name.removesuffix("[]")
                if isinstance(value, UploadFile):
                    if plain not in pictures:
                        raise ValueError(f"a file must be named image or mask, got {name!r}")
                    pictures[plain].append(base64_of(await value.read()))
                elif name.endswith("[]"):
                    values.setdefault(plain, []).append(value)
                else:
                    values[name] = _number(plain, value)
        images, masks = pictures["image"], pictures["mask"]
        if len(images) != 1 or len(masks) > 1:
            raise ValueError(f"image must be one picture, mask one or none; got {len(images)} and {len(masks)}")
        mask = masks[0] if masks else None
        return await _draw(service, request, ImagesRequest.model_validate(values), images[0], mask)

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.model_name:
            raise LookupError(f"model must be {service.model_name!r}, got {name!r}")
        return _model(service)

    return router


async def _draw(
    service: Service, request: Request, body: ImagesRequest, image: str | None, mask: str | None
) -> Response:
    if body.stream and (body.n or 1) != 1:
        raise ValueError(f"n must be 1 where stream is true, got {body.n}")
    client = body.user or request.state.client
    # a picture without a mask is its own, where it is transparent
    mask, read_mask = (image, transparency) if mask is None else (mask, from_transparency)
    options = _options(service, body)
    entry = await service.start(
        body.prompt, options, client=client, image=image, mask=mask, read_mask=read_mask, covering=as_masked
    )
    if body.stream:
        kind = "image_generation" if image is None else "image_edit"
        return StreamingResponse(_events(service, entry, body, kind), media_type="text/event-stream")
    out = await service.result(request, entry)
    form = body.output_format or "png"
    if body.response_format == "url":
        base = str(request.base_url).rstrip("/")
        data = [{"url": f"{base}/v1/pictures/{entry.id}/{i}.{form}"} for i in range(len(out.images))]
    else:
        pictures = await asyncio.to_thread(entry.pictures_base64, form)
        data = [{"b64_json": picture} for picture in pictures]
    return JSONResponse({"created": int(time.time()), "data": data} | _facts(out, form))


def _options(service: Service, body: ImagesRequest) -> dict[str, Any]:
    """Options of ``generate`` and of the customisation, from OpenAI's names and ours."""
    more = dict(body.model_extra or {})
    if body.model not in (None, service.model_name):
        raise LookupError(f"model must be {service.model_name!r}, got {body.model!r}")
    for name, neutral in _NEUTRAL.items():
        if name in more and more.pop(name) not in neutral:
            asked = (body.model_extra or {})[name]
            raise ValueError(f"{name} must be {' or '.join(map(repr, neutral))} on this model, got {asked!r}")
    unknown = sorted(more.keys() - {*_MODELS_OWN, *_CUSTOM})
    if unknown:
        known = ", ".join(sorted((*_MODELS_OWN, *_CUSTOM)))
        raise ValueError(f"there is no field {unknown[0]!r}; beside OpenAI's there are {known}")
    options: dict[str, Any] = {"images_per_prompt": body.n or 1} | more
    if body.size not in (None, "auto"):
        match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", body.size or "")
        if match is None:
            raise ValueError(f'size must be "auto" or width x height such as "512x512", got {body.size!r}')
        options["width"], options["height"] = int(match[1]), int(match[2])
    return options


async def _events(service: Service, entry: Entry, body: ImagesRequest, kind: str) -> AsyncIterator[str]:
    """Partial pictures, evenly spread over the steps, and the whole one."""
    partial, sent, form = body.partial_images or 0, 0, body.output_format or "png"
    async for step in service.watch(entry):
        if step and sent < partial and entry.latents is not None and step * (partial + 1) > (sent + 1) * entry.total:
            picture = await asyncio.to_thread(preview_of, service, entry, form)
            facts = {"type": f"{kind}.partial_image", "b64_json": picture, "partial_image_index": sent}
            yield event(facts["type"], facts | _about(body, form))
            sent += 1
    error = failure(entry.job)
    if error is not None:
        yield event("error", {"type": "error"} | describe(error)[1])
        return
    out = entry.job.result(0)
    (picture,) = await asyncio.to_thread(entry.pictures_base64, form)
    facts = {"type": f"{kind}.completed", "b64_json": picture, "usage": _USAGE}
    yield event(facts["type"], facts | _about(body, form) | _facts(out, form))


_USAGE = {  # tokens are not what is counted here
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}


def _about(body: ImagesRequest, form: str) -> dict[str, Any]:
    facts = {"size": body.size or "auto", "quality": "auto", "background": "opaque", "output_format": form}
    return facts | {"created_at": int(time.time())}


def _facts(out: Result, form: str) -> dict[str, Any]:
    return {
        "output_format": form,
        "size": f"{out.settings['width']}x{out.settings['height']}",
        "seeds": out.seeds,
    }


def _number(name: str, value: str) -> Any:
    """A form's field, which is text, as what JSON would have it."""
    if name not in ("n", "partial_images", "stream", *_NUMBERS):
        return value
    if name == "stream":
        return {"true": True, "false": False}.get(value, value)
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _model(service: Service) -> dict[str, Any]:
    facts: Mapping[str, Any] = {"object": "model", "created": int(service.started), "owned_by": "twinstream"}
    return {"id": service.model_name, **facts}
