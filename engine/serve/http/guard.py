"""What every request passes before an interface sees it: token, size of its body, and a line of log."""

from __future__ import annotations

import hmac
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import answer
from .service import Service

_OPEN = ("/", "/health", "/page.js", "/page.css")  # without a token; so are pictures, whose addresses are unguessable
_OPEN_BELOW = "/v1/pictures/"

LOG = logging.getLogger("twinstream.serve")


class Guard:
    """ASGI middleware.

    Args:
        app: what is guarded.
        service: whose limits hold, and who counts.
        tokens: one of which a request must bear; none if there are none.
        log_prompts: whether the log holds the bodies of JSON requests.
    """

    def __init__(self, app: ASGIApp, service: Service, tokens: Sequence[str], log_prompts: bool) -> None:
        self.app, self.service = app, service
        self.tokens, self.log_prompts = [token.encode() for token in tokens], log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, path = time.perf_counter(), 0, scope["path"]
        headers = {name.lower(): value for name, value in scope["headers"]}
        name = uuid.uuid4().hex[:16]
        host = (scope.get("client") or ("",))[0]
        scope.setdefault("state", {})["client"] = host
        limit, taken, body = self.service.limits.body_bytes, 0, bytearray()
        too_large = f"a body must have at most {limit} bytes on this server"

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            part = message.get("body", b"")
            taken += len(part)
            if taken > limit:
                raise HTTPException(413, too_large)
            if self.log_prompts and len(body) + len(part) < 10_000:
                body.extend(part)
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", name.encode()), *_HEADERS]
            await send(message)

        try:
            if not self._may_enter(path, headers.get(b"authorization", b"")):
                raised = answer("a bearer token is needed", "authentication_error", "invalid_token")
                await _send(noted, 401, raised, [(b"www-authenticate", b"Bearer")])
            else:
                await self.app(scope, counted, noted)
        finally:
            seconds = time.perf_counter() - start
            route = getattr(scope.get("route"), "path", "other")
            self.service.requests[route, status] += 1
            self.service.seconds[route] += seconds
            facts: dict[str, Any] = {"id": name, "method": scope["method"], "path": path, "status": status}
            if self.log_prompts and body:
                facts["body"] = body.decode("utf-8", "replace")
            LOG.info(json.dumps(facts | {"client": host, "ms": round(1000 * seconds, 1)}))

    def _may_enter(self, path: str, given: bytes) -> bool:
        if not self.tokens or path in _OPEN or path.startswith(_OPEN_BELOW):
            return True
        kind, _, token = given.partition(b" ")
        matches = [hmac.compare_digest(token.strip(), one) for one in self.tokens]  # all, whichever it is
        return kind.lower() == b"bearer" and any(matches)


_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", b"default-src 'self'; img-src 'self' data: blob:; style-src 'self'; base-uri 'none'"),
]


async def _send(
    send: Callable[[Message], Awaitable[None]],
    status: int,
    content: dict[str, Any],
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> None:
    body = json.dumps(content).encode()
    given = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": given})
    await send({"type": "http.response.body", "body": body})
