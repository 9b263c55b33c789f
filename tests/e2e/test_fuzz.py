"""Whatever clients send, the real engine behind the real server answers, stays healthy, and ends with nothing held."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st

from loongjax_server.app import create_app
from loongjax_server.config import ServerConfig
from tests.e2e.serve_process import ANSWER_TIMEOUT_S, ServeProcess, wait_until
from tests.server.fuzz_requests import nearly_right_requests, well_formed_requests
from tests.server.server_fakes import ByteTokenizer, FakeEngine

VOCAB_SIZE = 320
JSON_HEADERS = {"Content-Type": "application/json"}
SETTINGS = hypothesis.settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=(hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.filter_too_much),
)

OPENAPI = create_app(FakeEngine(), ByteTokenizer(), ServerConfig()).openapi()
schema = schemathesis.openapi.from_dict(OPENAPI)


@pytest.fixture(scope="module")
def fuzzed(checkpoint, engine_settings, tmp_path_factory) -> Iterator[ServeProcess]:
    """A server of our own: its context and queue are short, so that no request takes long."""
    log_path = tmp_path_factory.mktemp("fuzzed_server") / "log"
    process = ServeProcess(checkpoint, log_path, **engine_settings, max_model_len=96, max_queue_len=8)
    yield process
    process.kill()


@pytest.fixture(autouse=True)
def unharmed(fuzzed: ServeProcess) -> Iterator[None]:
    """After each test the engine answers, nothing of it is held, and it never had a failure to tell of."""
    yield
    assert fuzzed.request("GET", "/health")[0] == 200
    wait_until(lambda: fuzzed.metrics().value("vllm:num_requests_running") == 0, 30.0, "idle")
    assert fuzzed.metrics().value("vllm:num_requests_waiting") == 0
    assert fuzzed.metrics().by_instance("loongjax_kv_slots_used") == [0.0] * 3
    assert "ERROR" not in fuzzed.log
    assert "Traceback" not in fuzzed.log


def test_the_schema_does_not_depend_on_the_engine(fuzzed: ServeProcess):
    assert json.loads(fuzzed.request("GET", "/openapi.json")[2]) == OPENAPI


@schema.parametrize()
@SETTINGS
def test_no_request_of_the_schema_or_beside_it_gives_a_server_error(fuzzed: ServeProcess, case):
    response = case.call(base_url=fuzzed.url, timeout=ANSWER_TIMEOUT_S)
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@hypothesis.settings(SETTINGS, max_examples=60)
@hypothesis.given(nearly_right_requests())
def test_no_body_gives_a_server_error(fuzzed: ServeProcess, request_):
    path, data = request_
    status, answer = post(fuzzed, path, data)
    assert status < 500, (data, answer)


@hypothesis.settings(SETTINGS, max_examples=30)
@hypothesis.given(st.lists(well_formed_requests(VOCAB_SIZE), min_size=1, max_size=2))
def test_every_well_formed_request_is_answered_whatever_comes_beside_it(fuzzed: ServeProcess, requests):
    with ThreadPoolExecutor(len(requests)) as threads:
        answers = list(threads.map(lambda request: post(fuzzed, request[0], json.dumps(request[1]).encode()), requests))
    for (_, body), (status, answer) in zip(requests, answers, strict=True):
        assert status == 200, (body, answer)
        check_answer(body, answer)


@hypothesis.settings(SETTINGS, max_examples=20)
@hypothesis.given(well_formed_requests(VOCAB_SIZE), st.integers(0, 400))
def test_a_client_that_goes_away_at_any_point_leaves_nothing_behind(fuzzed: ServeProcess, request_, num_bytes):
    path, body = request_
    body |= {"stream": True, "max_tokens": 40, "ignore_eos": True}
    body.pop("prompt_logprobs", None)
    with contextlib.closing(fuzzed.connect()) as connection:
        connection.request("POST", path, json.dumps(body).encode(), JSON_HEADERS)
        if num_bytes:
            connection.getresponse().read(num_bytes)


def post(server: ServeProcess, path: str, data: bytes) -> tuple[int, bytes]:
    with contextlib.closing(server.connect()) as connection:
        connection.request("POST", path, data, JSON_HEADERS)
        response: http.client.HTTPResponse = connection.getresponse()
        return response.status, response.read()


def check_answer(body: dict[str, Any], answer: bytes) -> None:
    """JSON without NaN or infinities, no error, and every sample ends once."""
    if body["stream"]:
        *blocks, done, rest = answer.split(b"\n\n")
        assert (done, rest) == (b"data: [DONE]", b"")
        chunks = [strict_json(block.removeprefix(b"data: ")) for block in blocks]
    else:
        chunks = [strict_json(answer)]
    assert not any("error" in chunk for chunk in chunks), (body, answer)
    ends = [choice["index"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"] is not None]
    num_prompts = len(body["prompt"]) if isinstance(body.get("prompt"), list) and not is_one(body["prompt"]) else 1
    assert sorted(ends) == list(range(num_prompts * body.get("n", 1)))


def is_one(prompt: list[Any]) -> bool:
    """Whether a list is one prompt, of token ids."""
    return isinstance(prompt[0], int)


def strict_json(text: bytes) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON: {text[:1000]!r}")

    return json.loads(text, parse_constant=refuse)
