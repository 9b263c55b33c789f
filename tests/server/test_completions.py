"""POST /v1/completions, over a real socket."""

from __future__ import annotations

import json
import math
import time

import pytest
from server_client import RunningServer, wait_until
from server_fakes import BOS, SCRIPT, FakeEngine

from loongjax.core.request import TokenLogprobs
from loongjax.errors import QueueFullError

PATH = "/v1/completions"


def test_a_completion_has_the_schema_that_clients_parse(server: RunningServer):
    answer = server.post(PATH, {"model": "tiny-llama", "prompt": "hi", "max_tokens": 5})
    assert answer.status == 200
    body = answer.json
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["model"] == "tiny-llama"
    assert isinstance(body["created"], int)
    assert body["choices"] == [
        {"index": 0, "text": SCRIPT[:5], "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_sixteen_tokens_are_generated_unless_told_otherwise(server: RunningServer):
    for body in ({"prompt": "hi"}, {"prompt": "hi", "max_tokens": None}):
        assert server.post(PATH, body).json["choices"][0]["text"] == SCRIPT[:16]


def test_null_means_absent_for_every_optional_field(server: RunningServer):
    names = server.get("/openapi.json").json["components"]["schemas"]["CompletionBody"]["properties"]
    body = {name: None for name in names if name != "prompt"}
    assert server.post(PATH, {**body, "prompt": "hi"}).json["choices"][0]["text"] == SCRIPT[:16]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", [[BOS, 104, 105]]),
        (["hi", "a"], [[BOS, 104, 105], [BOS, 97]]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_prompts_are_text_or_ids_one_or_many(server: RunningServer, prompt, expected):
    answer = server.post(PATH, {"prompt": prompt, "max_tokens": 1})
    assert [choice["index"] for choice in answer.json["choices"]] == list(range(len(expected)))
    assert sorted(call.prompt_token_ids for call in server.engine.calls) == sorted(expected)
    assert answer.json["usage"]["prompt_tokens"] == sum(map(len, expected))


def test_choices_are_numbered_prompt_by_prompt(server: RunningServer):
    answer = server.post(PATH, {"prompt": ["a", "b"], "n": 2, "max_tokens": 3})
    texts = [choice["text"] for choice in answer.json["choices"]]
    assert [choice["index"] for choice in answer.json["choices"]] == [0, 1, 2, 3]
    assert texts == [SCRIPT[:3], SCRIPT[1:4]] * 2
    assert answer.json["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 12,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_many_prompts_never_open_more_engine_requests_than_configured(serve):
    engine = FakeEngine(delay_s=0.002)
    server = serve(engine, max_num_concurrent_choices=3)
    answer = server.post(PATH, {"prompt": ["x"] * 20, "max_tokens": 2})
    assert len(answer.json["choices"]) == 20
    assert engine.most_live == 3


def test_the_samples_of_many_prompts_count_against_that_bound(serve):
    engine = FakeEngine(delay_s=0.002)
    server = serve(engine, max_num_concurrent_choices=7)
    answer = server.post(PATH, {"prompt": ["x"] * 8, "n": 3, "max_tokens": 2})
    assert len(answer.json["choices"]) == 24
    assert engine.most_live == 2


def test_one_prompt_may_have_more_samples_than_that_bound(serve):
    server = serve(FakeEngine(), max_num_concurrent_choices=2)
    assert len(server.post(PATH, {"prompt": ["x"] * 2, "n": 3, "max_tokens": 1}).json["choices"]) == 6


@pytest.mark.parametrize("stream", [False, True])
def test_more_prompts_than_the_queue_holds_wait_for_their_places(serve, stream):
    engine = FakeEngine(delay_s=0.002)
    engine.max_live_samples = 5
    body = {"prompt": ["x"] * 12, "n": 2, "max_tokens": 2, "stream": stream}
    answer = serve(engine).post(PATH, body)
    assert answer.status == 200
    choices = (
        [choice for event in answer.events[:-1] for choice in event["choices"]] if stream else answer.json["choices"]
    )
    assert {choice["index"] for choice in choices if choice["finish_reason"] == "length"} == set(range(24))
    assert engine.num_live_samples == 0


def test_only_the_first_prompt_is_refused_by_a_full_queue(serve):
    engine = FakeEngine()
    server = serve(engine)
    engine.max_live_samples = 1
    assert server.post(PATH, {"prompt": ["x"] * 3, "n": 2}).status == 429
    engine.refuse_with, engine.num_refusals, engine.num_tries = QueueFullError("full"), 1, 0
    assert server.post(PATH, {"prompt": ["x"] * 3}).status == 429
    assert engine.num_live == 0


def test_a_client_that_goes_while_its_prompts_wait_for_places_leaves_nothing(serve):
    engine = FakeEngine(delay_s=0.01)
    engine.max_live_samples = 1
    server = serve(engine)
    connection = server.connect()
    body = json.dumps({"prompt": ["x"] * 3, "max_tokens": 4000})
    connection.request("POST", PATH, body, {"Content-Type": "application/json"})
    wait_until(lambda: engine.num_tries > 5)
    connection.close()
    wait_until(lambda: engine.num_live == 0)
    num_tries = engine.num_tries
    time.sleep(0.6)
    assert engine.num_tries == num_tries


def test_special_tokens_are_added_to_text_unless_refused(server: RunningServer):
    server.post(PATH, {"prompt": "hi", "add_special_tokens": False})
    assert server.engine.calls[0].prompt_token_ids == [104, 105]


@pytest.mark.parametrize(("limit", "expected"), [(2, [98, 99]), (100, [BOS, 97, 98, 99]), (-1, [BOS, 97, 98, 99])])
def test_truncation_keeps_the_last_tokens(server: RunningServer, limit, expected):
    server.post(PATH, {"prompt": "abc", "truncate_prompt_tokens": limit})
    assert server.engine.calls[0].prompt_token_ids == expected


def test_a_stop_ends_the_text_and_is_named(server: RunningServer):
    choice = server.post(PATH, {"prompt": "a", "stop": "q"}).json["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("The ", "stop", "q")
    choice = server.post(PATH, {"prompt": "a", "stop_token_ids": [ord("q")]}).json["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", ord("q"))
    choice = server.post(PATH, {"prompt": "a", "stop": ["q"], "include_stop_str_in_output": True}).json["choices"][0]
    assert choice["text"] == "The q"


def test_the_end_of_sequence_is_a_stop_without_a_name(serve):
    server = serve(FakeEngine(eos_after=3))
    choice = server.post(PATH, {"prompt": "a"}).json["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("The", "stop", None)
    ignoring = server.post(PATH, {"prompt": "a", "ignore_eos": True}).json["choices"][0]
    assert (ignoring["text"], ignoring["finish_reason"]) == (SCRIPT[:16], "length")


def test_echo_puts_the_prompt_in_front(server: RunningServer):
    for prompt, expected in ((["one", "two"], ["oneThe", "twoThe"]), ([[97, 98], [BOS, 99]], ["abThe", "cThe"])):
        answer = server.post(PATH, {"prompt": prompt, "echo": True, "max_tokens": 3})
        assert [choice["text"] for choice in answer.json["choices"]] == expected


def test_echo_of_a_truncated_prompt_is_what_the_model_saw(server: RunningServer):
    body = {"prompt": "abcdef", "echo": True, "max_tokens": 1, "truncate_prompt_tokens": 2}
    assert server.post(PATH, body).json["choices"][0]["text"] == "efT"


def test_echo_without_output_scores_the_prompt_alone(server: RunningServer):
    body = {"prompt": [97, 98, 99], "echo": True, "max_tokens": 0, "logprobs": 1}
    choice = server.post(PATH, body).json["choices"][0]
    assert choice["text"] == "abc"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] == {
        "text_offset": [0, 1, 2],
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -0.98, -0.99],
        "top_logprobs": [None, {"a": -1.0, "b": -0.98}, {"a": -1.0, "c": -0.99}],
    }


def test_echoed_logprobs_cover_prompt_and_output_as_evaluation_harnesses_read_them(server: RunningServer):
    body = {"prompt": [[97, 98], [99]], "echo": True, "max_tokens": 1, "logprobs": 1, "temperature": 0, "seed": 7}
    choices = server.post(PATH, body).json["choices"]
    assert [choice["logprobs"]["tokens"] for choice in choices] == [["a", "b", "T"], ["c", "T"]]
    assert [choice["logprobs"]["token_logprobs"] for choice in choices] == [[None, -0.98, -0.84], [None, -0.84]]
    assert [choice["logprobs"]["text_offset"] for choice in choices] == [[0, 1, 2], [0, 1]]


def test_logprobs_zero_tell_the_chosen_token_alone(server: RunningServer):
    logprobs = server.post(PATH, {"prompt": "a", "max_tokens": 2, "logprobs": 0}).json["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"T": -0.84}, {"h": -1.04}]
    assert logprobs["token_logprobs"] == [-0.84, -1.04]


def test_offsets_count_characters_that_span_tokens_once(serve):
    server = serve(FakeEngine("é中x"))
    choice = server.post(PATH, {"prompt": "a", "max_tokens": 6, "logprobs": 0}).json["choices"][0]
    assert choice["text"] == "é中x"
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 1, 1, 2]


def test_prompt_logprobs_are_listed_by_token_id(server: RunningServer):
    body = {"prompt": [97, 98], "max_tokens": 1, "prompt_logprobs": 1}
    choice = server.post(PATH, body).json["choices"][0]
    assert choice["prompt_logprobs"] == [
        None,
        {
            "97": {"logprob": -1.0, "rank": 1, "decoded_token": "a"},
            "98": {"logprob": -0.98, "rank": 99, "decoded_token": "b"},
        },
    ]


def test_token_ids_come_back_when_asked_for(server: RunningServer):
    choice = server.post(PATH, {"prompt": [1, 2], "max_tokens": 2, "return_token_ids": True}).json["choices"][0]
    assert choice["prompt_token_ids"] == [1, 2]
    assert choice["token_ids"] == [ord("T"), ord("h")]


def test_minus_infinity_is_told_as_a_finite_number(serve, monkeypatch):
    monkeypatch.setattr("server_fakes.logprob_of", lambda token_id, num_top: TokenLogprobs(token_id, -math.inf, 1))
    server = serve(FakeEngine())
    logprobs = server.post(PATH, {"prompt": "a", "max_tokens": 1, "logprobs": 0}).json["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [-9999.0]


def test_the_eos_id_beyond_the_text_does_not_move_offsets(serve):
    server = serve(FakeEngine(eos_after=1))
    logprobs = server.post(PATH, {"prompt": "a", "logprobs": 0}).json["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["T", "</s>"]
    assert logprobs["text_offset"] == [0, 1]
