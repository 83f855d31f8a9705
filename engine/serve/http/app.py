"""The server as one ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from ...version import __version__
from . import a1111, a1111_control, openai, own
from .book import FORMATS
from .errors import ERRORS, answer, describe
from .guard import Guard
from .service import GoneError, Service

_PAGE = Path(__file__).parent / "page"


def make_app(
    service: Service, tokens: Sequence[str] = (), log_prompts: bool = False, grace_seconds: float = 30.0
) -> FastAPI:
    """All interfaces over one service.

    Args:
        service: which the application closes at its end.
        tokens: of which clients must bear one; none if there are none.
        log_prompts: whether the log holds what is asked for.
        grace_seconds: for which what runs goes on when the server is told to stop; the rest is cancelled.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        ended = asyncio.ensure_future(asyncio.to_thread(service.scheduler.close))
        done, _late = await asyncio.wait({ended}, timeout=grace_seconds)
        if not done:
            for entry in service.book.unfinished():
                entry.job.cancel()
        await ended

    app = FastAPI(title="Twinstream", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    for interface in (own, openai, a1111, a1111_control):
        app.include_router(interface.make_router(service))
    _add_errors(app)
    _add_rest(app, service)
    app.add_middleware(Guard, service=service, tokens=tokens, log_prompts=log_prompts)  # type: ignore[arg-type]
    return app


def _add_errors(app: FastAPI) -> None:
    """Every error as ``errors.describe`` words it."""

    async def of_ours(_: Request, error: Exception) -> Response:
        status, body, headers = describe(error)
        return JSONResponse(body, status, headers)

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError | ValidationError)
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"] if part != "body")
        message = f"{param or 'the body'}: {first['msg']}"
        return JSONResponse(answer(message, "invalid_request_error", "invalid_value", param or None), 400)

    async def of_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = answer(str(error.detail), "invalid_request_error", str(error.status_code))
        return JSONResponse(message, error.status_code, dict(error.headers or {}))

    async def gone(_: Request, __: Exception) -> Response:
        return Response(status_code=499)

    for kind in (ValueError, LookupError, RuntimeError, CancelledError):
        app.add_exception_handler(kind, of_ours)
    for kind in (RequestValidationError, ValidationError):
        app.add_exception_handler(kind, invalid)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(GoneError, gone)


def _add_rest(app: FastAPI, service: Service) -> None:
    registry = CollectorRegistry()
    registry.register(_Measures(service))  # type: ignore[arg-type]

    @app.get("/health", responses={503: ERRORS[503]})
    async def health() -> dict[str, Any]:
        """Whether it draws."""
        if not service.scheduler.is_open:
            raise HTTPException(503, "the scheduler has ended")
        return {"status": "ok", "waiting": service.scheduler.waiting, "drawing": service.scheduler.drawing}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    @app.get("/v1/pictures/{job}/{file}", response_class=Response, responses=ERRORS)
    async def picture(job: str, file: str) -> Response:
        """A picture that an answer gave the address of."""
        number, _, form = file.partition(".")
        entry = service.book.find(job)
        if form not in FORMATS or not number.isdecimal() or len(number) > 3 or entry.status != "done":
            raise LookupError(f"there is no picture {file!r} of that job")
        data = await asyncio.to_thread(entry.picture, int(number), form)
        return Response(data, media_type=f"image/{form}")

    for path, file in (("/", "index.html"), ("/page.js", "page.js"), ("/page.css", "page.css")):
        app.add_api_route(path, _file(file), include_in_schema=False, response_class=FileResponse)


def _file(name: str) -> Any:
    async def send() -> FileResponse:
        return FileResponse(_PAGE / name)

    return send


class _Measures:
    """What the service counts, as Prometheus reads it."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterator[Metric]:
        scheduler = self.service.scheduler
        yield GaugeMetricFamily("twinstream_waiting", "requests before their first step", scheduler.waiting)
        yield GaugeMetricFamily("twinstream_drawing", "requests that are drawn or decoded", scheduler.drawing)
        counts = scheduler.counts
        yield CounterMetricFamily("twinstream_steps", "UNet batches", counts["steps"])
        yield CounterMetricFamily("twinstream_rows", "rows of UNet batches", counts["rows"])
        yield CounterMetricFamily("twinstream_step_seconds", "spent in UNet batches", scheduler.step_seconds)
        outcomes = CounterMetricFamily("twinstream_requests", "requests by outcome", labels=["outcome"])
        for outcome in ("done", "failed", "cancelled", "refused"):
            outcomes.add_metric([outcome], counts[outcome])
        yield outcomes
        answers = CounterMetricFamily("twinstream_http", "answers by path and status", labels=["path", "status"])
        for (path, status), count in list(self.service.requests.items()):
            answers.add_metric([path, str(status)], count)
        yield answers
        seconds = CounterMetricFamily("twinstream_http_seconds", "spent on answers by path", labels=["path"])
        for path, total in list(self.service.seconds.items()):
            seconds.add_metric([path], total)
        yield seconds
