"""Errors as clients read them: OpenAI's form, and A1111's ``detail`` beside it."""

from __future__ import annotations

from concurrent.futures import CancelledError
from typing import Any

from pydantic import BaseModel

from ...errors import DeadlineError, NonFiniteError, OutOfMemoryError, QueueFullError, SchedulerClosedError


class ErrorFacts(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    error: ErrorFacts
    detail: str


# of every path
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": description}
    for status, description in (
        (400, "something cannot be honoured"),
        (401, "the bearer token is missing or wrong"),
        (404, "there is no such thing"),
        (405, "the path has other methods"),
        (409, "the request was cancelled"),
        (413, "the body is too large"),
        (415, "the body is of another type"),
        (429, "as many requests wait as may; see Retry-After"),
        (500, "the model produced no picture"),
        (503, "not in time, not in this memory, or not any more"),
    )
}
_KINDS: tuple[tuple[type[BaseException], int, str, str], ...] = (
    (QueueFullError, 429, "rate_limit_error", "queue_full"),
    (DeadlineError, 503, "server_error", "deadline"),
    (OutOfMemoryError, 503, "server_error", "out_of_memory"),
    (SchedulerClosedError, 503, "server_error", "shutting_down"),
    (NonFiniteError, 500, "server_error", "non_finite"),
    (CancelledError, 409, "server_error", "cancelled"),
    (LookupError, 404, "invalid_request_error", "not_found"),
    (ValueError, 400, "invalid_request_error", "invalid_value"),
)


def describe(error: BaseException) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers; what is no error of a kind of ours is told by its type alone."""
    for kind, status, type_, code in _KINDS:
        if isinstance(error, kind):
            headers = {"Retry-After": str(int(error.retry_after) + 1)} if isinstance(error, QueueFullError) else {}
            return status, answer(str(error.args[0] if error.args else error), type_, code), headers
    return 500, answer(f"the server failed with {type(error).__name__}", "server_error", "failed"), {}


def answer(message: str, type_: str, code: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type_, "param": param, "code": code}, "detail": message}
