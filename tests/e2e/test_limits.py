"""What is refused, and how: too long, too much at once, the wrong key, and what the engine never hears of."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.e2e.golden_answers import GoldenAnswer
from tests.e2e.serve_process import ANSWER_TIMEOUT_S, ServeProcess

MODEL = "tiny-llama"
MAX_MODEL_LEN = 192
"""The least of what the pool (3 x 96 tokens) and one prefill (3 x 64 tokens) hold."""


@pytest.fixture(scope="module")
def small_server(checkpoint, engine_settings, tmp_path_factory) -> Iterator[ServeProcess]:
    """One with a key and a short queue."""
    log_path = tmp_path_factory.mktemp("small_server") / "log"
    process = ServeProcess(checkpoint, log_path, **engine_settings, api_key="right", max_queue_len=2)
    yield process
    process.kill()


def test_a_prompt_longer_than_the_context_is_told_so(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt=[5] * (MAX_MODEL_LEN + 1), max_tokens=1)
    assert refused.value.code == "context_length_exceeded"
    assert str(MAX_MODEL_LEN) in refused.value.message


def test_a_prompt_and_output_longer_than_the_context_are_told_so(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt=[5] * 100, max_tokens=MAX_MODEL_LEN - 99)
    assert refused.value.code == "context_length_exceeded"


def test_a_request_that_fills_the_context_to_the_last_token_is_served(client: openai.OpenAI, golden):
    """Its keys need two instances, and it has them."""
    completion = client.completions.create(
        model=MODEL,
        prompt=golden[3].prompt,
        max_tokens=MAX_MODEL_LEN - len(golden[3].prompt),
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    (choice,) = completion.choices
    assert choice.model_extra is not None
    golden[3].check_greedy(choice.model_extra["token_ids"])
    assert completion.usage is not None
    assert completion.usage.total_tokens == MAX_MODEL_LEN


def test_where_prompts_are_cut_only_those_that_cannot_be_are_too_long_for_a_prefill(serve, golden):
    server: ServeProcess = serve(policy="chunked", num_instances=1, num_slots=192)
    prompt = golden[3].prompt  # 150 tokens, and a prefill takes 64
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=ANSWER_TIMEOUT_S) as client:
        for options, remedy in (
            ({"max_tokens": 1, "extra_body": {"prompt_logprobs": 0}}, "do without prompt log-probabilities"),
            ({"max_tokens": 0, "echo": True}, "ask for a token"),
        ):
            with pytest.raises(openai.BadRequestError, match=remedy) as refused:
                client.completions.create(model=MODEL, prompt=prompt, **options)
            assert refused.value.code == "context_length_exceeded"
            assert "at most 64 tokens, but this one has 150" in refused.value.message
        completion = client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=8, temperature=0, extra_body={"return_token_ids": True}
        )
    (choice,) = completion.choices
    assert choice.model_extra is not None
    golden[3].check_greedy(choice.model_extra["token_ids"])


def test_token_ids_outside_the_vocabulary_are_refused(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError, match="319"):
        client.completions.create(model=MODEL, prompt=[5, 320], max_tokens=1)


def test_another_models_name_is_not_found(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a", max_tokens=1)


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}])
def test_a_wrong_key_is_refused(small_server: ServeProcess, headers: dict[str, str]):
    status, _, body = small_server.request("POST", "/v1/completions", {"prompt": "a"}, headers)
    assert status == 401
    assert json.loads(body)["error"]["code"] == "invalid_api_key"


def test_the_right_key_is_accepted(small_server: ServeProcess, golden: list[GoldenAnswer]):
    with openai.OpenAI(
        base_url=f"{small_server.url}/v1", api_key="right", max_retries=0, timeout=ANSWER_TIMEOUT_S
    ) as client:
        assert client.models.list().data[0].id == MODEL
        completion = client.completions.create(
            model=MODEL, prompt=golden[1].prompt, max_tokens=4, temperature=0, extra_body={"return_token_ids": True}
        )
    assert completion.choices[0].model_extra is not None
    golden[1].check_greedy(completion.choices[0].model_extra["token_ids"])


def test_a_full_queue_says_when_to_come_again_and_serves_whom_it_accepted(
    small_server: ServeProcess, golden: list[GoldenAnswer]
):
    body = {"prompt": golden[3].prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": True}

    def post(_: int) -> tuple[int, dict[str, str], bytes]:
        status, headers, answer = small_server.request(
            "POST", "/v1/completions", body, {"Authorization": "Bearer right"}
        )
        return status, dict(headers), answer

    with ThreadPoolExecutor(10) as threads:
        answers = list(threads.map(post, range(10)))
    assert {status for status, _, _ in answers} == {200, 429}
    for status, headers, answer in answers:
        if status == 429:
            assert int(headers["retry-after"]) >= 1
            assert json.loads(answer)["error"]["code"] == "rate_limit_exceeded"
        else:
            assert json.loads(answer)["usage"]["completion_tokens"] == 40
    time.sleep(float(next(headers["retry-after"] for status, headers, _ in answers if status == 429)))
    assert post(0)[0] == 200


def test_more_samples_than_the_queue_ever_holds_are_refused_for_good(small_server: ServeProcess):
    status, _, body = small_server.request(
        "POST", "/v1/completions", {"prompt": "a", "n": 3}, {"Authorization": "Bearer right"}
    )
    assert status == 400
    assert json.loads(body)["error"]["param"] == "n"
