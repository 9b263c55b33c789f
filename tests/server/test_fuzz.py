"""Nothing that a client can send makes the server fail."""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Iterator

import hypothesis
import pytest
import schemathesis
from server_client import RunningServer, exchange
from server_fakes import ByteTokenizer, FakeEngine

from loongjax_server.app import create_app
from loongjax_server.config import ServerConfig
from tests.server.fuzz_requests import nearly_right_requests

SETTINGS = hypothesis.settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=(hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.filter_too_much),
)

app = create_app(FakeEngine(eos_after=3), ByteTokenizer(), ServerConfig())
schema = schemathesis.openapi.from_asgi("/openapi.json", app)


@schema.parametrize()
@SETTINGS
def test_no_request_of_the_schema_or_beside_it_gives_a_server_error(case):
    response = case.call()
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def connection(shared_server: RunningServer) -> Iterator[http.client.HTTPConnection]:
    """One connection for all examples."""
    shared_server.engine.__init__(eos_after=3)
    with contextlib.closing(shared_server.connect()) as connection:
        yield connection


@hypothesis.settings(SETTINGS, max_examples=200)
@hypothesis.given(nearly_right_requests())
def test_no_body_gives_a_server_error_or_breaks_the_connection(connection: http.client.HTTPConnection, request_):
    path, data = request_
    answer = exchange(connection, "POST", path, data, {"Content-Type": "application/json"})
    assert answer.status < 500, (data, answer.body)
    if answer.headers["content-type"].startswith("application/json"):
        assert isinstance(answer.json, dict)
