"""Priorities and wished-for latencies reach the engine, and what is none is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
from server_client import Answer, RunningServer

from loongjax.core.request import NO_SLO, ServiceLevel

COMPLETIONS = {"prompt": "a", "max_tokens": 1}
CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
BOTH = pytest.mark.parametrize(("path", "body"), [("/v1/completions", COMPLETIONS), ("/v1/chat/completions", CHAT)])


def post(server: RunningServer, path: str, body: Mapping[str, object], headers: Mapping[str, str]) -> Answer:
    return server.request("POST", path, json.dumps(body).encode(), {"Content-Type": "application/json", **headers})


@BOTH
def test_they_reach_the_engine(server: RunningServer, path: str, body: dict[str, object]):
    headers = {"x-slo-ttft-ms": "200", "X-SLO-TPOT-MS": "12.5"}
    assert post(server, path, {**body, "priority": -3}, headers).status == 200
    (call,) = server.engine.calls
    assert (call.priority, call.slo) == (-3, ServiceLevel(ttft_s=0.2, tpot_s=0.0125))


def test_a_microsecond_is_the_shortest_wish(server: RunningServer):
    assert post(server, "/v1/completions", COMPLETIONS, {"x-slo-ttft-ms": "0.001"}).status == 200
    (call,) = server.engine.calls
    assert call.slo == ServiceLevel(ttft_s=1e-6)


@BOTH
def test_without_them_there_is_no_wish(server: RunningServer, path: str, body: dict[str, object]):
    assert post(server, path, {**body, "priority": None}, {}).status == 200
    (call,) = server.engine.calls
    assert (call.priority, call.slo) == (0, NO_SLO)


def test_they_hold_for_every_prompt_of_a_request(server: RunningServer):
    body = {"prompt": ["a", "b", "c"], "priority": 7, "stream": True}
    assert post(server, "/v1/completions", body, {"x-slo-tpot-ms": "30"}).status == 200
    assert {(call.priority, call.slo.ttft_s, call.slo.tpot_s) for call in server.engine.calls} == {(7, None, 0.03)}
    assert len(server.engine.calls) == 3


@pytest.mark.parametrize("name", ["x-slo-ttft-ms", "x-slo-tpot-ms"])
@pytest.mark.parametrize(
    "value", ["", "0", "0.000", "0.0009", "-1", "fast", "1e3", "nan", "inf", "1_0", "1,5", "5 ms", "9" * 400]
)
@BOTH
def test_what_is_no_number_of_milliseconds_is_400(
    server: RunningServer, name: str, value: str, path: str, body: dict[str, object]
):
    answer = post(server, path, body, {name: value})
    assert (answer.status, answer.error["type"], answer.error["param"]) == (400, "invalid_request_error", name)
    assert f"{name} must be a number of milliseconds, at least 0.001, such as" in answer.error["message"]
    assert server.engine.calls == []


def test_a_header_that_comes_twice_is_400(server: RunningServer):
    connection = server.connect()
    data = json.dumps(COMPLETIONS).encode()
    connection.putrequest("POST", "/v1/completions")
    for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(data)))):
        connection.putheader(name, value)
    for value in ("200", "300"):
        connection.putheader("x-slo-ttft-ms", value)
    connection.endheaders(data)
    response = connection.getresponse()
    assert response.status == 400
    assert json.loads(response.read())["error"]["param"] == "x-slo-ttft-ms"
    connection.close()


def test_the_api_document_names_the_headers(server: RunningServer):
    paths = server.get("/openapi.json").json["paths"]
    for path in ("/v1/completions", "/v1/chat/completions"):
        names = [parameter["name"] for parameter in paths[path]["post"]["parameters"]]
        assert names == ["x-slo-ttft-ms", "x-slo-tpot-ms"]
