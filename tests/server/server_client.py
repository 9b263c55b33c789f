"""A client that hides nothing: raw bytes over one socket."""

from __future__ import annotations

import asyncio
import dataclasses
import http.client
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI
from server_fakes import FakeEngine


@dataclasses.dataclass
class Answer:
    """A complete response."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        return error

    @property
    def events(self) -> list[Any]:
        """Payloads of an event stream, whose framing is checked to the byte; the last one is "[DONE]"."""
        assert self.headers["content-type"].startswith("text/event-stream")
        assert b"\r" not in self.body
        assert self.body.endswith(b"\n\n")
        payloads: list[Any] = []
        for block in self.body[:-2].split(b"\n\n"):
            assert block.startswith(b"data: ")
            assert b"\n" not in block
            payload = block.removeprefix(b"data: ")
            payloads.append("[DONE]" if payload == b"[DONE]" else json.loads(payload))
        return payloads


@dataclasses.dataclass
class RunningServer:
    """A server in a thread."""

    port: int
    engine: FakeEngine
    app: FastAPI
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, timeout_s: float = 20.0) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)

    def get(self, path: str, **headers: str) -> Answer:
        return self.request("GET", path, None, headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", path, data, {"Content-Type": "application/json", **headers})

    def request(self, method: str, path: str, data: bytes | None, headers: Mapping[str, str]) -> Answer:
        connection = self.connect()
        try:
            return exchange(connection, method, path, data, headers)
        finally:
            connection.close()

    def call(self, function: Callable[[], Any]) -> None:
        """Runs a function on the server's loop."""
        self.loop.call_soon_threadsafe(function)


def exchange(
    connection: http.client.HTTPConnection, method: str, path: str, data: bytes | None, headers: Mapping[str, str]
) -> Answer:
    """One request on a connection that stays open."""
    connection.request(method, path, data, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    names = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, names, response.read())


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Returns as soon as the condition holds; fails when time is over."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition never came to hold"
        time.sleep(0.005)
