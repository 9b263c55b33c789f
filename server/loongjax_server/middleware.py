"""What surrounds every request: its id, the API key, draining, and the last line of defence against a 500."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loongjax.errors import EngineDeadError
from loongjax_server.context import ServerContext
from loongjax_server.errors import AuthenticationError, http_error, log_error
from loongjax_server.request_id import HEADER, take_header_id

OPEN_PATHS = frozenset({"/health", "/ping", "/version", "/metrics", "/docs", "/openapi.json"})
"""Paths that need no key and that answer while the server drains."""


class RequestMiddleware:
    """Gives every response its X-Request-Id, and turns what no handler caught into a 500 on a live connection."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        take_header_id(scope)
        is_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                MutableHeaders(scope=message)[HEADER.decode()] = scope["state"]["request_id"]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            log_error(error, scope["state"]["request_id"])
            if is_started:
                raise
            await http_error(error).response()(scope, receive, send_with_id)


class AdmissionMiddleware:
    """Asks for the API key, refuses new work while draining, and counts the requests that draining waits for."""

    def __init__(self, app: ASGIApp, context: ServerContext) -> None:
        self._app = app
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _path(scope) in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        self._context.enter()
        try:
            await self._app(scope, receive, send)
        finally:
            self._context.leave()

    def _refusal(self, scope: Scope) -> Response | None:
        key = self._context.api_key
        if key is not None:
            scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
            is_right = hmac.compare_digest(token.strip().encode(), key.encode())
            if scheme.lower() != "bearer" or not is_right:
                return http_error(AuthenticationError("missing or wrong API key: send it as a Bearer token")).response()
        if self._context.is_draining:
            response = http_error(EngineDeadError("the server is shutting down")).response()
            response.headers["Connection"] = "close"
            return response
        return None


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    root_path: str = scope.get("root_path", "")
    return path.removeprefix(root_path) if root_path else path
