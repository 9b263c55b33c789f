"""Server-sent events, framed as clients expect: `data: <json>`, then an empty line, with line feeds only."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loongjax_server.disconnect import until_disconnect
from loongjax_server.errors import ClientDisconnectedError, http_error, log_error
from loongjax_server.json_pieces import json_pieces

DONE = b"data: [DONE]\n\n"


def event(payload: Mapping[str, Any]) -> bytes:
    """One event with a JSON payload, which may hold `JsonArray`s."""
    return b"".join((b"data: ", *json_pieces(payload), b"\n\n"))


class EventStream(Response):
    """A response of events; `[DONE]` follows the last.

    The status line waits for the first event: what fails before it is an ordinary HTTP error. What fails later is told
    by an `error` event. `events` is closed promptly when the client goes away.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[Mapping[str, Any], None], request_id: str) -> None:
        self.events = events
        self.request_id = request_id
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send_events(send))
        except ClientDisconnectedError as error:
            log_error(error, self.request_id)

    async def _send_events(self, send: Send) -> None:
        async with contextlib.aclosing(self.events) as events:
            chunk = event(await anext(events))
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await _send_body(send, chunk)
            try:
                async for payload in events:
                    await _send_body(send, event(payload))
            except Exception as error:
                log_error(error, self.request_id)
                await _send_body(send, event(http_error(error).body))
            await _send_body(send, DONE)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_body(send: Send, chunk: bytes) -> None:
    await send({"type": "http.response.body", "body": chunk, "more_body": True})
