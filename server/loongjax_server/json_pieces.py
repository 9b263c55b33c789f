"""Long JSON, written piece by piece, so that no piece takes long.

A response with log-probabilities of 100,000 tokens is 40 MB of JSON. To build its values, to write them at once and to
let go of them takes seconds, in which nothing else runs, not even in another thread, for none of it is Python code.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loongjax_server.json_response import dump_json

SLICE = 64
"""Values that are written at once."""
CHUNK_BYTES = 65_536
"""Bytes of a response's body that are sent at once."""


class JsonArray:
    """An array that is written as it grows: only its text is kept, and the last few values."""

    def __init__(self, values: Iterable[Any] = ()) -> None:
        self._chunks: list[bytes] = []
        self._text = bytearray()
        """What follows the chunks."""
        self._unwritten: list[Any] = []
        self.extend(values)

    def extend(self, values: Iterable[Any]) -> None:
        """Appends values. Raises ValueError for NaN and infinities, now or later."""
        for some in itertools.batched(values, SLICE):
            self._unwritten += some
            if len(self._unwritten) >= SLICE:
                self._write()

    def pieces(self) -> Iterator[bytes]:
        """Its text so far."""
        self._write()
        yield b"["
        yield from self._chunks
        yield bytes(self._text)
        yield b"]"

    def _write(self) -> None:
        if not self._unwritten:
            return
        if self._text or self._chunks:
            self._text += b","
        self._text += memoryview(dump_json(self._unwritten))[1:-1]
        self._unwritten.clear()
        if len(self._text) >= CHUNK_BYTES:
            self._chunks.append(bytes(self._text))
            self._text.clear()


def json_pieces(value: Any) -> Iterator[bytes]:
    """The text of a value that may hold `JsonArray`s, in objects and in lists of objects."""
    if isinstance(value, JsonArray):
        yield from value.pieces()
    elif _is_plain(value):
        yield dump_json(value)
    elif isinstance(value, dict):
        for index, (name, item) in enumerate(value.items()):
            yield (b"," if index else b"{") + dump_json(name) + b":"
            yield from json_pieces(item)
        yield b"}"
    else:
        for index, item in enumerate(value):
            yield b"," if index else b"["
            yield from json_pieces(item)
        yield b"]"


class PiecewiseJsonResponse(Response):
    """A response of one JSON value that may hold `JsonArray`s."""

    media_type = "application/json"

    def __init__(self, content: Any) -> None:
        self._pieces = list(json_pieces(content))
        self.status_code = 200
        self.background = None
        self.init_headers({"Content-Length": str(sum(map(len, self._pieces)))})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        chunk = bytearray()
        for piece in self._pieces:
            chunk += piece
            if len(chunk) >= CHUNK_BYTES:
                await send({"type": "http.response.body", "body": bytes(chunk), "more_body": True})
                chunk.clear()
        await send({"type": "http.response.body", "body": bytes(chunk), "more_body": False})


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return all(map(_is_plain, value))
    return not isinstance(value, JsonArray)
