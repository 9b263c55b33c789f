"""What goes wrong is told in OpenAI's error shape, with the right status, on a connection that lives on."""

from __future__ import annotations

import contextlib
import json
import logging

import pytest
from server_client import RunningServer, exchange, wait_until
from server_fakes import MAX_MODEL_LEN, VOCAB_SIZE, FakeEngine

from loongjax.errors import ConfigError, EngineDeadError, EngineError, QueueFullError, RequestError
from loongjax_server.errors import http_error

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("path", ["/", "/nothing", "/v1/embeddings", "/v1/models/other", "/v1/completions/"])
def test_what_is_not_there_is_404(server: RunningServer, path):
    answer = server.get(path)
    assert (answer.status, answer.error["type"]) == (404, "NotFoundError")


@pytest.mark.parametrize(("method", "path"), [("GET", COMPLETIONS), ("DELETE", "/health"), ("POST", "/v1/models")])
def test_a_wrong_method_is_405_and_names_the_right_one(server: RunningServer, method, path):
    answer = server.request(method, path, b"", {})
    assert answer.status == 405
    assert answer.headers["allow"]
    assert answer.error["message"] == "Method Not Allowed"


@pytest.mark.parametrize("path", ["/health", "/ping"])
def test_probes_may_ask_for_the_head_alone(server: RunningServer, path):
    answer = server.request("HEAD", path, None, {})
    assert (answer.status, answer.body) == (200, b"")
    server.engine.is_dead = True
    answer = server.request("HEAD", path, None, {})
    assert (answer.status, answer.body) == (503, b"")


def test_an_unknown_model_is_404(server: RunningServer):
    for path in (COMPLETIONS, CHAT, "/tokenize"):
        body = {"model": "gpt-9", "prompt": "a", "messages": [{"role": "user", "content": "a"}]}
        answer = server.post(path, body)
        assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")
        assert "gpt-9" in answer.error["message"]


def test_too_long_a_prompt_is_told_in_the_words_that_clients_look_for(server: RunningServer):
    for body in ({"prompt": [1] * (MAX_MODEL_LEN + 1)}, {"prompt": "a", "max_tokens": MAX_MODEL_LEN}):
        for stream in (False, True):
            answer = server.post(COMPLETIONS, {**body, "stream": stream})
            assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
            assert "maximum context length" in answer.error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_429_and_says_when_to_come_back(server: RunningServer, stream):
    server.engine.refuse_with = QueueFullError("256 requests wait", retry_after_s=1.5)
    answer = server.post(COMPLETIONS, {"prompt": "a", "stream": stream})
    assert (answer.status, answer.error["type"]) == (429, "rate_limit_error")
    assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("2", "1500")


@pytest.mark.parametrize("stream", [False, True])
def test_a_dead_engine_is_503(server: RunningServer, stream):
    server.engine.is_dead = True
    answer = server.post(COMPLETIONS, {"prompt": "a", "stream": stream})
    assert (answer.status, answer.error["code"]) == (503, "service_unavailable")


@pytest.mark.parametrize("stream", [False, True])
def test_what_nobody_foresaw_is_a_500_without_details_and_a_log(server: RunningServer, stream, caplog):
    server.engine.refuse_with = ZeroDivisionError("a secret path")
    with caplog.at_level(logging.ERROR, logger="loongjax_server"):
        answer = server.post(COMPLETIONS, {"prompt": "a", "stream": stream})
        assert (answer.status, answer.error["type"]) == (500, "InternalServerError")
        assert "secret" not in answer.error["message"]
        wait_until(lambda: "a secret path" in caplog.text)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestError("x", "y"), 400),
        (QueueFullError("x"), 429),
        (EngineError("x"), 500),
        (EngineDeadError(), 503),
        (ConfigError("x"), 500),
    ],
)
def test_the_table_knows_every_error(error, status):
    answer = http_error(error)
    assert answer.status == status
    assert answer.body["error"]["message"]


MALFORMED = [
    b"",
    b"null",
    b"[]",
    b"3",
    b'"x"',
    b"{",
    b'{"prompt": "a"',
    b'{"prompt": "\xff"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a", "\\udfff": 1}',
    b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"prompt": "a", "x": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    '{"prompt": "a"}'.encode("utf-16"),
]


@pytest.mark.parametrize("data", MALFORMED, ids=lambda data: repr(data[:30]))
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_malformed_json_is_400(server: RunningServer, path, data):
    answer = server.post(path, data)
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 400])
def test_numbers_that_are_none_are_400(server: RunningServer, number):
    for name in (b"temperature", b"top_p", b"repetition_penalty"):
        answer = server.post(COMPLETIONS, b'{"prompt": "a", "' + name + b'": ' + number + b"}")
        assert (answer.status, answer.error["param"]) == (400, name.decode())


WRONG = {
    "prompt": [None, 3, 1.5, True, {}, [], [[]], ["a", 1], [1, "a"], [1.0], [True], [None], [[1], "a"], [[1], [2.5]]],
    "max_tokens": ["5", 1.5, True, -1, 10**30],
    "n": [0, -1, 10**6, 1.0],
    "temperature": [False, "1", -0.1, [], {}],
    "top_p": [0, -1, 1.5],
    "top_k": [-2, 1.5],
    "min_p": [-0.1, 2],
    "seed": [1.5, "x", 2**63, -(2**63) - 1],
    "presence_penalty": [3, "x"],
    "frequency_penalty": [-3],
    "repetition_penalty": [0, -1],
    "logprobs": [-1, 21, True],
    "prompt_logprobs": [-1, 21],
    "stop": ["", [""], ["a"] * 5, 3, [3]],
    "stop_token_ids": [[-1], [VOCAB_SIZE], [1.5], "x", [2**40]],
    "logit_bias": [{"x": 1}, {"1": 101}, {"-1": 1}, {"1": "x"}, {str(VOCAB_SIZE): 1}, {"9" * 5000: 1}, [], {"²": 1}],
    "min_tokens": [-1, 17, 1.5],
    "stream": [1, "true"],
    "stream_options": [{"include_usage": True}, 3],
    "echo": [1],
    "model": [3],
    "truncate_prompt_tokens": [0, -2],
    "request_id": ["", "a b", "é", "x" * 129, "a\nb", 3],
    "ignore_eos": ["yes"],
    "user": [3],
    "priority": [1.5, "1", True, 2**63],
    "best_of": [2],
    "suffix": ["x"],
    "response_format": [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}, "json", [], 0],
    "structured_outputs": [{"regex": "a"}],
    "guided_json": [{"type": "object"}],
    "logits_processors": [["x"]],
    "allowed_token_ids": [[1]],
    "bad_words": [["x"]],
    "use_beam_search": [True],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_value_that_cannot_be_honoured_is_400_and_named(server: RunningServer, name, value):
    answer = server.post(COMPLETIONS, {"prompt": "a", name: value})
    assert answer.status == 400
    assert answer.error["param"] == name
    assert server.engine.calls == []


@pytest.mark.parametrize("prompt", [[-1], [VOCAB_SIZE], [10**30], [[1], [2**31]], [-(10**400)]])
def test_ids_outside_the_vocabulary_are_400(server: RunningServer, prompt):
    answer = server.post(COMPLETIONS, {"prompt": prompt, "echo": True})
    assert (answer.status, answer.error["param"]) == (400, "prompt")


def test_an_empty_prompt_is_400(server: RunningServer):
    answer = server.post(COMPLETIONS, {"prompt": "", "add_special_tokens": False, "echo": True, "logprobs": 1})
    assert (answer.status, answer.error["param"]) == (400, "prompt")


def test_prompt_logprobs_are_not_streamed(server: RunningServer):
    answer = server.post(COMPLETIONS, {"prompt": "a", "prompt_logprobs": 1, "stream": True})
    assert (answer.status, answer.error["param"]) == (400, "prompt_logprobs")


@pytest.mark.parametrize(
    "extra",
    [
        {"suffix": None},
        {"suffix": ""},
        {"best_of": 1},
        {"best_of": 2, "n": 2},
        {"response_format": {"type": "text"}},
        {"response_format": None},
        {"structured_outputs": None},
        {"bad_words": []},
        {"logit_bias": None},
        {"top_k": -1},
        {"top_k": 10**12},
        {"min_tokens": 16},
    ],
)
def test_harmless_values_of_unsupported_fields_pass(server: RunningServer, extra):
    assert server.post(COMPLETIONS, {"prompt": "a", **extra}).status == 200


def test_too_many_choices_are_refused(serve):
    server = serve(FakeEngine(), max_num_choices=10)
    assert server.post(COMPLETIONS, {"prompt": ["a"] * 5, "n": 2}).status == 200
    answer = server.post(COMPLETIONS, {"prompt": ["a"] * 6, "n": 2})
    assert (answer.status, answer.error["param"]) == (400, "n")


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x"]
)
def test_other_content_types_are_refused(server: RunningServer, content_type):
    answer = server.request("POST", COMPLETIONS, b'{"prompt": "a"}', {"Content-Type": content_type})
    assert answer.status == 400
    assert "application/json" in answer.error["message"]


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON", "application/x+json"])
def test_json_has_several_names(server: RunningServer, content_type):
    assert server.request("POST", COMPLETIONS, b'{"prompt": "a"}', {"Content-Type": content_type}).status == 200


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_above_the_limit_is_413(serve, announced):
    server = serve(FakeEngine(), max_body_bytes=1000)
    data = json.dumps({"prompt": "a" * 2000}).encode()
    with contextlib.closing(server.connect()) as connection:
        if announced:
            connection.request("POST", COMPLETIONS, data, JSON)
        else:
            connection.request("POST", COMPLETIONS, iter([data[:500], data[500:]]), JSON, encode_chunked=True)
        response = connection.getresponse()
        response.read()
        assert response.status == 413
        assert exchange(connection, "POST", COMPLETIONS, b'{"prompt": "a"}', JSON).status == 200


def test_a_pooled_connection_survives_every_error(server: RunningServer):
    faults = (RequestError("x"), QueueFullError("x"), EngineDeadError("x"), EngineError("x"), OSError("x"), None)
    statuses: list[int] = []
    sockets: set[object] = set()
    with contextlib.closing(server.connect()) as connection:
        for fault in faults:
            server.engine.refuse_with = fault
            for stream in (False, True):
                body = json.dumps({"prompt": "a", "stream": stream}).encode()
                statuses.append(exchange(connection, "POST", COMPLETIONS, body, JSON).status)
                sockets.add(connection.sock)
        for path in ("/nothing", "/v1/models"):
            statuses.append(exchange(connection, "GET", path, None, {}).status)
            sockets.add(connection.sock)
    assert statuses == [400, 400, 429, 429, 503, 503, 500, 500, 500, 500, 200, 200, 404, 200]
    assert len(sockets) == 1


def test_an_unknown_field_is_warned_about_once(serve, caplog):
    server = serve(FakeEngine())
    with caplog.at_level(logging.WARNING, logger="loongjax_server"):
        for _ in range(3):
            assert server.post(COMPLETIONS, {"prompt": "a", "wibble": 1, "metadata": {}}).status == 200
    assert [record.getMessage() for record in caplog.records if "wibble" in record.getMessage()] == [
        "ignoring unknown field 'wibble'; said once"
    ]
    assert "metadata" not in caplog.text
