"""Streams, to the byte, and the rules that measuring clients rely on."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest
from server_client import RunningServer, wait_until
from server_fakes import SCRIPT, FakeEngine

from loongjax.core.request import FinishReason
from loongjax.errors import EngineDeadError, EngineError

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def test_a_completion_stream_is_exactly_these_bytes(server: RunningServer):
    body = {"prompt": "a", "max_tokens": 2, "stream": True, "request_id": "r1"}
    answer = server.post(COMPLETIONS, body)
    created = answer.events[0]["created"]
    header = f'{{"id":"cmpl-r1","object":"text_completion","created":{created},"model":"tiny-llama","choices":'
    expected = (
        f'data: {header}[{{"index":0,"text":"T","logprobs":null,"finish_reason":null,"stop_reason":null}}]}}\n\n'
        f'data: {header}[{{"index":0,"text":"h","logprobs":null,"finish_reason":"length","stop_reason":null}}]}}\n\n'
        "data: [DONE]\n\n"
    )
    assert answer.body.decode() == expected
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"


def test_a_chat_stream_brings_the_role_with_the_first_token(server: RunningServer):
    events = server.post(CHAT, {"messages": HI, "max_tokens": 3, "stream": True}).events
    assert events[-1] == "[DONE]"
    chunks = events[:-1]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": "T"},
        {"content": "h"},
        {"content": "e"},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_every_token_step_has_one_chunk_though_it_may_lack_text(serve, path):
    server = serve(FakeEngine("中x", eos_after=4))
    events = server.post(path, {"messages": HI, "prompt": "a", "stream": True}).events[:-1]
    choices = [event["choices"][0] for event in events]
    texts = [choice["text"] if path == COMPLETIONS else choice["delta"]["content"] for choice in choices]
    assert texts == ["", "", "中", "x", ""]
    assert choices[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_usage_comes_last_without_choices_and_is_null_before(server: RunningServer, path):
    body = {"messages": HI, "prompt": "a", "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
    events = server.post(path, body).events
    assert events[-1] == "[DONE]"
    assert [event["usage"] for event in events[:-2]] == [None, None]
    assert events[-2]["choices"] == []
    usage = events[-2]["usage"]
    assert usage["completion_tokens"] == 2
    assert usage["total_tokens"] == usage["prompt_tokens"] + 2
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


def test_continuous_usage_counts_along(server: RunningServer):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "a", "max_tokens": 3, "stream": True, "stream_options": options}
    events = server.post(COMPLETIONS, body).events[:-1]
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 3]
    assert events[-1]["choices"] == []


def test_no_usage_is_told_unless_asked_for(server: RunningServer):
    events = server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 2, "stream": True}).events[:-1]
    assert all("usage" not in event for event in events)


def test_choices_interleave_and_each_ends_once(server: RunningServer):
    body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 4, "stream": True, "stream_options": {"include_usage": True}}
    events = server.post(COMPLETIONS, body).events[:-1]
    texts: dict[int, str] = {}
    ends: list[int] = []
    for event in events[:-1]:
        choice = event["choices"][0]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        if choice["finish_reason"]:
            ends.append(choice["index"])
    assert texts == {0: SCRIPT[:4], 1: SCRIPT[1:5], 2: SCRIPT[:4], 3: SCRIPT[1:5]}
    assert sorted(ends) == [0, 1, 2, 3]
    assert events[-1]["usage"]["completion_tokens"] == 16


def test_echo_and_its_logprobs_come_with_the_first_token(server: RunningServer):
    body = {"prompt": [97, 98], "echo": True, "logprobs": 0, "max_tokens": 2, "stream": True}
    first, second = (event["choices"][0] for event in server.post(COMPLETIONS, body).events[:-1])
    assert (first["text"], second["text"]) == ("abT", "h")
    assert first["logprobs"]["tokens"] == ["a", "b", "T"]
    assert first["logprobs"]["token_logprobs"] == [None, -0.98, -0.84]
    assert second["logprobs"]["text_offset"] == [3]


def test_echo_alone_streams_one_chunk(server: RunningServer):
    body = {"prompt": "ab", "echo": True, "max_tokens": 0, "stream": True}
    events = server.post(COMPLETIONS, body).events
    assert [event["choices"][0]["text"] for event in events[:-1]] == ["ab"]
    assert events[0]["choices"][0]["finish_reason"] == "length"


def test_token_ids_stream_with_their_tokens(server: RunningServer):
    body = {"prompt": [5], "max_tokens": 2, "stream": True, "return_token_ids": True}
    choices = [event["choices"][0] for event in server.post(COMPLETIONS, body).events[:-1]]
    assert [choice["token_ids"] for choice in choices] == [[ord("T")], [ord("h")]]
    assert [choice["prompt_token_ids"] for choice in choices] == [[5], None]


def test_nothing_is_sent_before_the_first_token(serve):
    engine = FakeEngine()
    engine.first_token = asyncio.Event()
    server = serve(engine)
    body = json.dumps({"messages": HI, "max_tokens": 1, "stream": True}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=0.3) as connection:
        connection.sendall(head.encode() + body)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(10)
        server.call(engine.first_token.set)
        assert connection.recv(12) == b"HTTP/1.1 200"


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (EngineError("device lost"), "InternalServerError", "device lost"),
        (EngineDeadError("the engine died"), "ServiceUnavailableError", "the engine died"),
        (RuntimeError("a secret"), "InternalServerError", "internal server error"),
    ],
)
def test_a_failure_in_mid_stream_is_told_in_the_stream(serve, error, kind, message):
    engine = FakeEngine()
    engine.fail_after = (2, lambda: error)
    server = serve(engine)
    answer = server.post(COMPLETIONS, {"prompt": "a", "stream": True})
    assert answer.status == 200
    assert [event["choices"][0]["text"] for event in answer.events[:2]] == ["T", "h"]
    assert answer.events[2]["error"]["type"] == kind
    assert answer.events[2]["error"]["message"] == message
    assert answer.events[3:] == ["[DONE]"]


@pytest.mark.parametrize(
    ("reason", "status", "message"),
    [(FinishReason.ERROR, 500, "device lost"), (FinishReason.ABORT, 503, "aborted")],
)
def test_a_sample_that_fails_or_is_aborted_is_an_error_not_a_short_answer(serve, reason, status, message):
    engine = FakeEngine()
    engine.finish_after = (1, reason)
    server = serve(engine)
    answer = server.post(COMPLETIONS, {"prompt": "a"})
    assert answer.status == status
    assert message in answer.error["message"]
    events = server.post(COMPLETIONS, {"prompt": "a", "stream": True}).events
    assert message in events[1]["error"]["message"]
    assert events[2] == "[DONE]"
    wait_until(lambda: engine.num_live == 0)


def test_one_failed_prompt_of_many_ends_the_others(serve):
    engine = FakeEngine(delay_s=0.01)
    engine.fail_after = (3, lambda: EngineError("device lost"))
    server = serve(engine)
    answer = server.post(COMPLETIONS, {"prompt": ["a", "b", "c"], "max_tokens": 500})
    assert answer.status == 500
    wait_until(lambda: engine.num_live == 0)
