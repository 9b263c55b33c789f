"""Signals end a process that serves: the first one drains it, the second one ends it at once."""

from __future__ import annotations

import http.client
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from server_client import Answer, exchange, wait_until

SCRIPT = pathlib.Path(__file__).parent / "drain_process.py"
PATH = "/v1/completions"
JSON = {"Content-Type": "application/json"}


class Process:
    """A server in a process."""

    def __init__(self, delay_s: float, drain_timeout_s: float) -> None:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu"}
        self.popen = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(delay_s), str(drain_timeout_s)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self.popen.stderr is not None
        self.port = 0
        for line in self.popen.stderr:
            if match := re.search(r"ready: http://127.0.0.1:(\d+)", line):
                self.port = int(match[1])
                break
        assert self.port, "the server did not start"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def start(self, **fields) -> http.client.HTTPConnection:
        """Sends a request; the answer is read later."""
        connection = self.connect()
        connection.request("POST", PATH, json.dumps({"prompt": "a", **fields}), JSON)
        return connection

    def signal(self) -> None:
        self.popen.send_signal(signal.SIGTERM)

    def end(self) -> tuple[int, str]:
        """Exit status and log, once it has ended."""
        _, log = self.popen.communicate(timeout=20)
        return self.popen.returncode, log


@pytest.fixture
def launch() -> Iterator[Callable[[float, float], Process]]:
    processes: list[Process] = []

    def start(delay_s: float, drain_timeout_s: float) -> Process:
        processes.append(Process(delay_s, drain_timeout_s))
        return processes[-1]

    yield start
    for process in processes:
        if process.popen.poll() is None:
            process.popen.kill()
        process.popen.communicate()


def read(connection: http.client.HTTPConnection, response: http.client.HTTPResponse | None = None) -> Answer:
    """The whole answer, of which the head may have been read before."""
    response = response or connection.getresponse()
    answer = Answer(response.status, {name.lower(): text for name, text in response.getheaders()}, response.read())
    connection.close()
    return answer


def test_live_requests_finish_new_ones_are_refused_and_the_exit_is_clean(launch):
    process = launch(0.05, 20)
    kept = process.connect()
    assert exchange(kept, "GET", "/health", None, {}).status == 200
    whole = process.start(max_tokens=20)
    stream = process.start(max_tokens=20, stream=True)
    head = stream.getresponse()
    process.signal()
    time.sleep(0.2)
    refused = exchange(kept, "POST", PATH, b'{"prompt": "a"}', JSON)
    assert (refused.status, refused.error["code"]) == (503, "service_unavailable")
    assert refused.headers["connection"] == "close"
    kept.close()
    late = process.start(max_tokens=1)
    refused = read(late)
    assert (refused.status, refused.error["code"]) == (503, "service_unavailable")
    probe = process.connect()
    assert exchange(probe, "GET", "/health", None, {}).status == 503
    probe.close()
    assert read(whole).json["usage"]["completion_tokens"] == 20
    events = read(stream, head).events
    assert len(events) == 21
    assert events[-1] == "[DONE]"
    status, log = process.end()
    assert status == 0, log
    assert "closed, 0 aborted" in log
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", process.port), timeout=5).close()


def test_an_idle_server_ends_at_once(launch):
    process = launch(0.0, 20)
    start_s = time.monotonic()
    process.signal()
    assert process.end()[0] == 0
    assert time.monotonic() - start_s < 3


def test_requests_that_take_too_long_are_aborted_with_an_error(launch):
    process = launch(0.05, 0.5)
    stream = process.start(max_tokens=4000, stream=True)
    head = stream.getresponse()
    process.signal()
    events = read(stream, head).events
    assert "aborted" in events[-2]["error"]["message"]
    assert events[-1] == "[DONE]"
    status, log = process.end()
    assert status == 0, log


def test_the_second_signal_ends_the_process_at_once(launch):
    process = launch(0.05, 60)
    stream = process.start(max_tokens=4000, stream=True)
    head = stream.getresponse()
    process.signal()
    time.sleep(0.2)
    assert process.popen.poll() is None
    process.signal()
    wait_until(lambda: process.popen.poll() is not None, 3)
    assert process.popen.returncode == -signal.SIGTERM
    head.close()
    stream.close()
