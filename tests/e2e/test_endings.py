"""How it ends: by a signal, after all that was promised; or because the engine is gone, and then nobody waits."""

from __future__ import annotations

import http.client
import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.golden_answers import GoldenAnswer
from tests.e2e.serve_process import ServeProcess, wait_until

PATH = "/v1/completions"
pytestmark = pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds the engine's process in /proc")


class Stream:
    """A stream whose first event has come."""

    def __init__(self, server: ServeProcess, answer: GoldenAnswer, max_tokens: int) -> None:
        self._connection = server.connect()
        body = {"prompt": answer.prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        body |= {"ignore_eos": True, "return_token_ids": True}
        self._connection.request("POST", PATH, json.dumps(body), {"Content-Type": "application/json"})
        self._response = self._connection.getresponse()
        assert self._response.status == 200
        self._first = self._read_event()

    def read_on(self) -> list[Any]:
        """Payloads of all events, the first included, until the stream ends or breaks off; the last may be "[DONE]"."""
        payloads = [self._first]
        try:
            while (payload := self._read_event()) is not None:
                payloads.append(payload)
        except (http.client.HTTPException, ConnectionError):
            pass
        self._connection.close()
        return payloads

    def _read_event(self) -> Any:
        line = self._response.readline().strip()
        if not line:
            return None
        assert self._response.readline() == b"\n"
        payload = line.removeprefix(b"data: ")
        return "[DONE]" if payload == b"[DONE]" else json.loads(payload)


def token_ids(payloads: list[Any]) -> list[int]:
    return [token_id for payload in payloads for token_id in payload["choices"][0]["token_ids"]]


def test_sigterm_lets_live_streams_finish_and_then_exits_cleanly(serve, golden: list[GoldenAnswer]):
    server: ServeProcess = serve()
    streams = [Stream(server, golden[i], 60) for i in (0, 1, 2)]
    server.terminate()
    with ThreadPoolExecutor(3) as threads:
        results = list(threads.map(Stream.read_on, streams))
    for i, payloads in enumerate(results):
        assert payloads[-1] == "[DONE]", payloads[-1]
        ids = token_ids(payloads[:-1])
        assert len(ids) == 60
        golden[i].check_greedy(ids)
        assert payloads[-2]["choices"][0]["finish_reason"] == "length"
    assert server.wait() == 0, server.log
    assert "Traceback" not in server.log
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=5).close()


def test_a_killed_engine_ends_every_stream_with_an_error_and_the_server_says_so(serve, golden: list[GoldenAnswer]):
    server: ServeProcess = serve(num_slots=4096, max_num_batched_tokens=1024)
    # So many tokens that none ends while programs for the next one are compiled: no group waits for another.
    streams = [Stream(server, golden[i], 3000) for i in (0, 1, 2)]
    assert server.request("GET", "/health")[0] == 200
    server.kill_engine()
    with ThreadPoolExecutor(3) as threads:
        results = list(threads.map(Stream.read_on, streams))
    for payloads in results:
        errors = [payload for payload in payloads if payload != "[DONE]" and "error" in payload]
        assert len(errors) == 1
        assert errors[0]["error"]["code"] == "service_unavailable"
    assert server.request("GET", "/health")[0] == 503
    status, headers, _ = server.request("POST", PATH, {"prompt": "a"})
    assert status == 503
    assert "retry-after" in headers
    status, _, page = server.request("GET", "/metrics")
    assert status == 200
    assert b"vllm:engine_healthy" in page
    server.terminate()
    wait_until(lambda: server.has_ended, 30.0, "the exit of a server without an engine")
    assert "Traceback" not in server.log
