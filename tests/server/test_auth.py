"""The API key, and request ids."""

from __future__ import annotations

import pytest
from server_client import RunningServer
from server_fakes import FakeEngine

from loongjax_server.config import API_KEY_VARIABLE

BODY = {"prompt": "a", "max_tokens": 1}
GUARDED = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/nothing"]


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", "Basic key", "key", "Bearer keykey", "Bearer \xff"]
)
def test_without_the_right_key_the_answer_is_401(serve, header):
    server = serve(FakeEngine(), api_key="key")
    headers = {} if header is None else {"Authorization": header}
    for path in GUARDED:
        answer = server.post(path, BODY, **headers)
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert server.get("/v1/models", **headers).status == 401


def test_with_the_key_everything_works(serve):
    server = serve(FakeEngine(), api_key="kéy")
    assert server.post("/v1/completions", BODY, Authorization="bearer kéy").status == 200


def test_the_environment_may_hold_the_key(serve, monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, "from-env")
    server = serve(FakeEngine())
    assert server.post("/v1/completions", BODY).status == 401
    assert server.post("/v1/completions", BODY, Authorization="Bearer from-env").status == 200


def test_probes_need_no_key(serve):
    server = serve(FakeEngine(), api_key="key")
    assert [server.get(path).status for path in ("/health", "/ping", "/version", "/metrics")] == [200] * 4


def test_a_prefix_that_a_proxy_strips_changes_nothing(serve):
    server = serve(FakeEngine(), api_key="key", root_path="/llm")
    assert server.get("/health").status == 200
    assert server.get("/v1/models").status == 401
    assert server.get("/v1/models", Authorization="Bearer key").status == 200


def test_the_clients_request_id_comes_back(server: RunningServer):
    answer = server.post("/v1/completions", BODY, X_Request_Id="abc-1")
    assert answer.headers["x-request-id"] == "abc-1"
    assert answer.json["id"] == "cmpl-abc-1"
    assert server.get("/nothing", X_Request_Id="abc-2").headers["x-request-id"] == "abc-2"


def test_the_bodys_request_id_has_precedence(server: RunningServer):
    for stream in (False, True):
        answer = server.post("/v1/completions", {**BODY, "request_id": "mine", "stream": stream}, X_Request_Id="x")
        assert answer.headers["x-request-id"] == "mine"


def test_a_request_without_a_usable_id_gets_a_new_one(server: RunningServer):
    ids = {server.get("/v1/models", X_Request_Id=value).headers["x-request-id"] for value in ("", "a b", "x" * 500)}
    assert len(ids) == 3
    assert all(len(request_id) == 32 for request_id in ids)


def test_equal_ids_of_clients_stay_apart_in_the_engine(server: RunningServer):
    for _ in range(2):
        server.post("/v1/completions", {**BODY, "prompt": ["a", "b"], "request_id": "same"})
    assert len({call.request_id for call in server.engine.calls}) == 4
