"""Nothing that a client can send makes the server fail."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from server_client import RunningServer, exchange
from server_fakes import ByteTokenizer, FakeEngine

from loongjax_server.app import create_app
from loongjax_server.config import ServerConfig
from loongjax_server.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

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


BODIES = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 2**31, 2**63, -(2**63) - 1, 10**100, 1e308, 5e-324, float("nan"), float("inf"), -0.0])
    | st.floats()
    | st.text()
    | st.sampled_from(["\ud800", "\x00", "text", "user", "none", "auto", "</s>", "\U0010ffff"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4) | st.sampled_from(["type", "text", "role", "content"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@st.composite
def requests(draw) -> tuple[str, bytes]:
    """A path, and a body that is right but for a few fields."""
    path = draw(st.sampled_from(sorted(BODIES)))
    body: dict[str, object] = {"max_tokens": 2}
    if path == "/detokenize":
        body["tokens"] = [1]
    elif path == "/v1/chat/completions":
        body["messages"] = [{"role": "user", "content": "a"}]
    else:
        body["prompt"] = "a"
    fields = st.sampled_from(sorted(BODIES[path].model_fields)) | st.text(max_size=8)
    body.update(draw(st.dictionaries(fields, VALUES, max_size=3)))
    data = json.dumps(body).encode()
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=4)) + data[at + draw(st.integers(0, 3)) :]
    return path, data


@pytest.fixture(scope="module")
def connection(shared_server: RunningServer) -> Iterator[http.client.HTTPConnection]:
    """One connection for all examples."""
    shared_server.engine.__init__(eos_after=3)
    with contextlib.closing(shared_server.connect()) as connection:
        yield connection


@hypothesis.settings(SETTINGS, max_examples=200)
@hypothesis.given(requests())
def test_no_body_gives_a_server_error_or_breaks_the_connection(connection: http.client.HTTPConnection, request_):
    path, data = request_
    answer = exchange(connection, "POST", path, data, {"Content-Type": "application/json"})
    assert answer.status < 500, (data, answer.body)
    if answer.headers["content-type"].startswith("application/json"):
        assert isinstance(answer.json, dict)
