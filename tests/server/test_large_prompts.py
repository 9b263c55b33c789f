"""A million tokens are parsed fast, and nobody's stream stutters meanwhile."""

from __future__ import annotations

import importlib
import itertools
import json
import threading
import time
from collections.abc import Sequence

import pytest
from server_fakes import ByteTokenizer, FakeEngine

from loongjax.errors import RequestError
from loongjax_server.body import parse_body
from loongjax_server.logprobs import CompletionLogprobs
from loongjax_server.schemas import ChatBody, CompletionBody, DetokenizeBody

NUM_IDS = 500_000


def fastest_s(work, repetitions: int = 3) -> float:
    durations: list[float] = []
    for _ in range(repetitions):
        start_s = time.perf_counter()
        work()
        durations.append(time.perf_counter() - start_s)
    return min(durations)


@pytest.mark.parametrize(("body_type", "name"), [(CompletionBody, "prompt"), (DetokenizeBody, "tokens")])
def test_half_a_million_ids_parse_within_half_a_second(body_type, name):
    data = json.dumps({name: list(range(NUM_IDS))}).encode()
    assert fastest_s(lambda: parse_body(data, body_type)) < 0.5
    assert getattr(parse_body(data, body_type), name)[-1] == NUM_IDS - 1


@pytest.mark.parametrize(
    ("body_type", "name", "values"),
    [
        (CompletionBody, "prompt", [*range(NUM_IDS), "x"]),
        (CompletionBody, "prompt", ["x"] * NUM_IDS + [1]),
        (CompletionBody, "stop_token_ids", ["x"] * NUM_IDS),
        (CompletionBody, "stop", ["x"] * NUM_IDS),
        (CompletionBody, "logit_bias", {str(i): 1 for i in range(NUM_IDS)}),
        (ChatBody, "messages", [1] * NUM_IDS),
        (DetokenizeBody, "tokens", [None] * NUM_IDS),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_half_a_million_faults_are_refused_within_a_second(body_type, name, values):
    data = json.dumps({"prompt": "a", "messages": [], name: values}).encode()

    def refuse() -> None:
        with pytest.raises(RequestError):
            parse_body(data, body_type)

    assert fastest_s(refuse, 2) < 1.0


class SlowTokenizer(ByteTokenizer):
    """Takes half a second for text that begins with "slow"."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if text.startswith("slow"):
            time.sleep(0.5)
        return super().encode(text, add_special_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        if token_ids and token_ids[0] == ord("~"):
            time.sleep(0.5)
        return super().decode(token_ids, skip_special_tokens)


@pytest.mark.parametrize(("num_tokens", "is_threaded"), [(4000, True), (40, False)])
@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_only_long_prompts_logprobs_are_written_in_a_thread(server, monkeypatch, endpoint, num_tokens, is_threaded):
    module = importlib.import_module(f"loongjax_server.{endpoint}")
    original, threads = module.prompt_logprobs, []

    def write(*arguments):
        threads.append(threading.current_thread().name)
        return original(*arguments)

    monkeypatch.setattr(module, "prompt_logprobs", write)
    text = "a" * num_tokens
    if endpoint == "chat":
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1, "prompt_logprobs": 1}
        entries = server.post("/v1/chat/completions", body).json["prompt_logprobs"]
    else:
        body = {"prompt": text, "max_tokens": 1, "prompt_logprobs": 1}
        entries = server.post("/v1/completions", body).json["choices"][0]["prompt_logprobs"]
    assert len(entries) > num_tokens
    assert [name.startswith("loongjax-tokenizer") for name in threads] == [is_threaded]


@pytest.mark.parametrize(("num_tokens", "is_threaded"), [(4000, True), (40, False)])
def test_a_stream_writes_only_the_logprobs_of_a_long_prompt_it_echoes_in_a_thread(
    server, monkeypatch, num_tokens, is_threaded
):
    original, threads = CompletionLogprobs.write, []

    def write(*arguments, **options):
        threads.append(threading.current_thread().name)
        return original(*arguments, **options)

    monkeypatch.setattr(CompletionLogprobs, "write", write)
    body = {"prompt": "a" * num_tokens, "max_tokens": 3, "echo": True, "logprobs": 1, "stream": True}
    first, *_ = server.post("/v1/completions", body).events
    assert len(first["choices"][0]["logprobs"]["tokens"]) > num_tokens
    *of_prompt, second, third = [name.startswith("loongjax-tokenizer") for name in threads]
    assert set(of_prompt) == {is_threaded}
    assert second is third is False


def test_slow_tokenization_holds_up_no_stream(serve):
    server = serve(FakeEngine(delay_s=0.01), SlowTokenizer())
    requests = [
        ("/v1/completions", {"prompt": "slow", "max_tokens": 1}),
        ("/tokenize", {"prompt": "slow"}),
        ("/detokenize", {"tokens": [ord("~")]}),
    ]
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda path=path, body=body: statuses.append(server.post(path, body).status))
        for path, body in requests
    ]
    connection = server.connect()
    body = json.dumps({"prompt": "a", "max_tokens": 60, "stream": True})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    for thread in threads:
        thread.start()
    arrivals_s: list[float] = []
    while response.readline():
        arrivals_s.append(time.perf_counter())
    connection.close()
    for thread in threads:
        thread.join()
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(arrivals_s)]
    assert statuses == [200, 200, 200]
    assert max(gaps_s) < 0.4
