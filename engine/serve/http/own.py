"""Our own interface: every argument of ``generate``, jobs, concepts, and what is measured."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import fields
from typing import Annotated, Any, Literal, get_type_hints

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, create_model

from ...methods.asked import Asked
from ...result import Result
from ...sampling.arguments import Options
from ...sampling.samplers import SAMPLERS
from ...sampling.schedule import SCHEDULES
from .book import Entry, base64_of, encoded, failure
from .errors import ERRORS, describe
from .service import OVER_HTTP, Service

_CLIENTS_NAME = Field(None, pattern=r"^[A-Za-z0-9_-]{1,64}$")


class ControlGiven(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    net: str = Field(description="a name, of those that /v1/about lists")
    image: str | Annotated[list[str], Field(min_length=1, max_length=64)] = Field(
        description="the hint, or one per prompt or per image, base64"
    )
    weight: float = 1.0
    start: float = Field(0.0, description="from which share of the steps it acts")
    end: float = 1.0
    guess_mode: bool = False


class ImagePromptGiven(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    adapter: str = Field(description="a name, of those that /v1/about lists")
    image: str | Annotated[list[str], Field(min_length=1, max_length=64)] = Field(
        description="a picture, or several that are attended to together, base64"
    )
    scale: float = 1.0


class _Common(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=64)]
    image: str | Annotated[list[str], Field(min_length=1, max_length=64)] | None = Field(
        None, description="picture(s) to start from, base64"
    )
    mask: str | Annotated[list[str], Field(min_length=1, max_length=64)] | None = Field(
        None, description="what of them to redraw, white, and what to keep, black; base64"
    )
    control: Annotated[list[ControlGiven], Field(max_length=64)] = Field(
        [], description="ControlNets; all act upon all"
    )
    image_prompts: Annotated[list[ImagePromptGiven], Field(max_length=64)] = Field(
        [], description="pictures beside the text of every prompt"
    )
    mode: Literal["wait", "stream", "job"] = Field(
        "wait", description="answer with the pictures; with events as they come; or at once with a job's id (202)"
    )
    previews: int = Field(0, ge=0, le=50, description="of how many steps a stream sends a preview")
    format: Literal["png", "jpeg", "webp"] = "png"
    request_id: str | None = _CLIENTS_NAME
    deadline: float | None = Field(None, ge=0, description="seconds in which the pictures must be there")


def _described(kind: type, names: tuple[str, ...]) -> dict[str, Any]:
    """Fields of an options class, as pydantic has them; values are checked where they always are."""
    types, by_name = get_type_hints(kind), {one.name: one for one in fields(kind)}
    return {
        name: (
            types[name],
            Field(by_name[name].default, description=by_name[name].metadata.get("help")),
        )
        for name in names
    }


_FROM_ASKED = tuple(one.name for one in fields(Asked))
GenerateRequest = create_model(
    "GenerateRequest", __base__=_Common, **_described(Options, OVER_HTTP), **_described(Asked, _FROM_ASKED)
)


class JobState(BaseModel):
    id: str
    status: Literal["waiting", "drawing", "done", "failed", "cancelled"]
    position: int | None = Field(None, description="how many begin before it, and itself; 0 while it is drawn")
    step: int
    total: int
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


def make_router(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", responses=ERRORS)

    @router.post(
        "/generate",
        responses={202: {"model": JobState}, 200: {"content": {"application/json": {}, "text/event-stream": {}}}},
    )
    async def generate(body: GenerateRequest, request: Request) -> Response:  # type: ignore[valid-type]
        """Draw pictures."""
        given = body.model_dump(include={*OVER_HTTP, *_FROM_ASKED}, exclude_unset=True)
        entry = await service.start(
            body.prompt,
            given,
            client=request.state.client,
            image=body.image,
            mask=body.mask,
            control=[one.model_dump() for one in body.control],
            image_prompts=[one.model_dump() for one in body.image_prompts],
            request_id=body.request_id,
            deadline=body.deadline,
        )
        if body.mode == "job":
            return JSONResponse(_state(entry).model_dump(), 202, {"Location": f"/v1/jobs/{entry.id}"})
        if body.mode == "stream":
            return StreamingResponse(
                _events(service, entry, body.previews, body.format), media_type="text/event-stream"
            )
        out = await service.result(request, entry)
        return JSONResponse(await asyncio.to_thread(result_of, entry, out, body.format))

    @router.get("/jobs/{name}")
    async def job(name: str) -> JobState:
        """How far a job is, and what it drew."""
        entry = service.book.find(name)
        state = _state(entry)
        if state.status == "done":
            state.result = await asyncio.to_thread(result_of, entry, entry.job.result(0), "png")
        return state

    @router.get("/jobs/{name}/events", response_class=StreamingResponse)
    async def events(name: str, previews: Annotated[int, Field(ge=0, le=50)] = 0) -> StreamingResponse:
        """A job's events from now on; going away leaves it alone."""
        stream = _events(service, service.book.find(name), previews, "png", cancel=False)
        return StreamingResponse(stream, media_type="text/event-stream")

    @router.delete("/jobs/{name}")
    async def cancel(name: str) -> JobState:
        """Cancel a job; one that is done stays as it is."""
        entry = service.book.find(name)
        entry.job.cancel()
        return _state(entry)

    @router.get("/concepts")
    async def concepts() -> dict[str, list[dict[str, Any]]]:
        return {"concepts": [await asyncio.to_thread(service.shelf.facts, name) for name in service.shelf.names()]}

    @router.get("/concepts/{name}", response_class=Response)
    async def concept(name: str) -> Response:
        """A concept's file."""
        return Response(await asyncio.to_thread(service.shelf.data, name), media_type="application/octet-stream")

    @router.put("/concepts/{name}", status_code=201)
    async def put(name: str, request: Request) -> dict[str, Any]:
        """Keep a concept file, sent as the body as it is."""
        await asyncio.to_thread(service.shelf.put, name, await request.body())
        return await asyncio.to_thread(service.shelf.facts, name)

    @router.delete("/concepts/{name}", status_code=204)
    async def delete(name: str) -> None:
        await asyncio.to_thread(service.shelf.delete, name)

    @router.get("/about")
    async def about() -> dict[str, Any]:
        """What the model is and what may be asked of it."""
        limits, sd = service.limits, service.sd
        side = sd.limits.sample_size * sd.limits.factor
        return {
            "model": sd.name,
            "device": str(sd.device),
            "dtype": str(sd.dtype).removeprefix("torch."),
            "size": side,
            "factor": sd.limits.factor,
            "samplers": list(SAMPLERS),
            "schedules": list(SCHEDULES),
            "controls": list(service.nets.controls),
            "image_prompt_adapters": list(service.nets.adapters),
            "limits": {one.name: getattr(limits, one.name) for one in fields(limits)},
        }

    return router


def result_of(entry: Entry, out: Result, form: str) -> dict[str, Any]:
    """A result as JSON."""
    n = len(out.images)
    there = [out.foundation_images is not None and out.foundation_images[i] is not None for i in range(n)]
    return {
        "id": entry.id,
        "images": entry.pictures_base64(form),
        "foundation_images": [base64_of(entry.picture(i, form, True)) if there[i] else None for i in range(n)],
        "format": form,
        "seeds": out.seeds,
        "settings": out.settings,
        "timings": {name: round(value, 4) for name, value in out.timings.items()},
    }


def _state(entry: Entry) -> JobState:
    error = failure(entry.job) if entry.job.done() else None
    return JobState(
        id=entry.id,
        status=entry.status,  # type: ignore[arg-type]
        position=entry.job.position,
        step=entry.step,
        total=entry.total,
        error=None if error is None else describe(error)[1]["error"],
    )


async def _events(service: Service, entry: Entry, previews: int, form: str, cancel: bool = True) -> AsyncIterator[str]:
    """Server-sent events: "progress" after steps, then "result" or "error"."""
    yield event("progress", _state(entry).model_dump(exclude_none=True))
    shown = 0
    async for step in service.watch(entry, cancel):
        state = _state(entry).model_dump(exclude_none=True)
        if previews and step and entry.latents is not None and step * previews // max(1, entry.total) > shown:
            shown = step * previews // max(1, entry.total)
            state["preview"] = await asyncio.to_thread(preview_of, service, entry)
        yield event("progress", state)
    error = failure(entry.job)
    if error is None:
        yield event("result", await asyncio.to_thread(result_of, entry, entry.job.result(0), form))
    else:
        yield event("error", describe(error)[1])


def preview_of(service: Service, entry: Entry, form: str = "jpeg") -> str:
    """What the first picture of a job is like, base64."""
    assert entry.latents is not None
    return base64_of(encoded(service.previews.picture(entry.latents), form))


def event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"
