"""Long JSON is what short JSON would be, and is written without holding the event loop."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server_client import RunningServer
from server_fakes import ByteTokenizer, logprob_of

from loongjax_server.json_pieces import CHUNK_BYTES, SLICE, JsonArray, PiecewiseJsonResponse, json_pieces
from loongjax_server.json_response import dump_json
from loongjax_server.logprobs import CompletionLogprobs
from loongjax_server.sse import event
from loongjax_server.token_text import TokenTexts

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=20
)


def with_arrays(value: Any) -> Any:
    """The same value, with an array for every list but those of objects."""
    if isinstance(value, dict):
        return {name: with_arrays(item) for name, item in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [with_arrays(item) for item in value]
    return JsonArray(value) if isinstance(value, list) else value


@settings(deadline=None)
@given(VALUES)
def test_a_value_in_pieces_is_the_same_text(value):
    text = dump_json(value)
    assert b"".join(json_pieces(value)) == text
    assert b"".join(json_pieces(with_arrays(value))) == text
    assert event({"value": with_arrays(value)}) == b'data: {"value":' + text + b"}\n\n"


@settings(deadline=None)
@given(st.lists(st.lists(SCALARS, max_size=3 * SLICE), max_size=5))
def test_an_array_that_grows_is_the_array_of_all_its_values(parts):
    array = JsonArray()
    for part in parts:
        array.extend(part)
        assert b"".join(array.pieces()).startswith(b"[")
    assert b"".join(array.pieces()) == dump_json([value for part in parts for value in part])


def test_no_piece_of_a_long_array_is_long():
    values = list(range(200_000))
    pieces = list(JsonArray(values).pieces())
    assert json.loads(b"".join(pieces)) == values
    assert max(map(len, pieces)) < CHUNK_BYTES + SLICE * 8


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_array_refuses_what_json_does_not_have(value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        list(JsonArray([value]).pieces())


def test_a_response_tells_its_length_and_comes_in_chunks():
    content = {"id": "x", "choices": [{"logprobs": JsonArray(range(100_000))}], "usage": None}
    response = PiecewiseJsonResponse(content)
    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing is to be received")

    asyncio.run(response({"type": "http"}, receive, send))
    start, *bodies = messages
    body = b"".join(message["body"] for message in bodies)
    assert dict(start["headers"])[b"content-length"] == str(len(body)).encode()
    assert dict(start["headers"])[b"content-type"] == b"application/json"
    assert [message["more_body"] for message in bodies] == [True] * (len(bodies) - 1) + [False]
    assert max(len(message["body"]) for message in bodies) < 3 * CHUNK_BYTES
    assert json.loads(body) == {"id": "x", "choices": [{"logprobs": list(range(100_000))}], "usage": None}


@settings(deadline=None)
@given(st.text(alphabet="aé中😀", max_size=3 * SLICE), st.integers(0, 2 * SLICE), st.none() | st.just(256))
def test_logprobs_in_arrays_are_those_in_lists(text, split, first_token_id):
    tokens = [logprob_of(byte, 2) for byte in text.encode()]
    at_once, in_parts = (CompletionLogprobs(TokenTexts(ByteTokenizer()), skip_special_tokens=True) for _ in range(2))
    arrays = in_parts.empty_arrays()
    in_parts.write_arrays(arrays, tokens[:split], first_token_id)
    in_parts.write_arrays(arrays, tokens[split:])
    assert json.loads(b"".join(json_pieces(arrays))) == at_once.write(tokens, first_token_id)


async def longest_hold_s(done: asyncio.Event) -> float:
    """The longest time that the loop's thread computed without a look at what else there is to do, in seconds."""
    longest_s, before_s = 0.0, time.thread_time()
    while not done.is_set():
        await asyncio.sleep(0)
        now_s = time.thread_time()
        longest_s, before_s = max(longest_s, now_s - before_s), now_s
    return longest_s


@pytest.mark.parametrize("endpoint", ["chat/completions", "completions"])
def test_a_long_response_with_logprobs_never_holds_the_event_loop(server: RunningServer, endpoint: str):
    body: dict[str, Any] = {"n": 4, "max_tokens": 600, "ignore_eos": True}
    if endpoint == "completions":
        body |= {"prompt": "a", "logprobs": 5}
    else:
        body |= {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 20}
    done = asyncio.Event()
    gc.collect()
    gc.freeze()  # as `launch` does; else a look at all that the tests have loaded may come in between
    watching = asyncio.run_coroutine_threadsafe(longest_hold_s(done), server.loop)
    answer = server.post(f"/v1/{endpoint}", body)
    server.loop.call_soon_threadsafe(done.set)
    gc.unfreeze()
    assert len(answer.json["choices"]) == 4
    # Written at once, it took 0.2 s and more.
    assert watching.result(20) < 0.05
