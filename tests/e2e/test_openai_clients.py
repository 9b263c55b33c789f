"""The official client against the real engine: transformers' tokens and log-probabilities, by every door."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import openai
import pytest
from openai.types import Completion, CompletionChoice

from tests.e2e.golden_answers import GoldenAnswer
from tests.e2e.serve_process import ANSWER_TIMEOUT_S, ServeProcess

MODEL = "tiny-llama"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}
RAW: dict[str, Any] = {"ignore_eos": True, "return_token_ids": True}
"""Extensions of the API, by which tokens are compared and not text."""


def complete(client: openai.OpenAI, prompt: str | list[int], *, extra: dict[str, Any] | None = None, **fields: Any):
    completion = client.completions.create(**GREEDY | fields, prompt=prompt, extra_body=RAW | (extra or {}))
    assert isinstance(completion, Completion)
    return completion


def token_ids(choice: Any) -> list[int]:
    return choice.model_extra["token_ids"]


def logprobs(choice: CompletionChoice) -> Sequence[float]:
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    return choice.logprobs.token_logprobs


@pytest.mark.parametrize("i", range(4))
def test_greedy_completions_are_those_of_transformers(client, golden: list[GoldenAnswer], i: int):
    answer = golden[i]
    completion = complete(client, answer.prompt, max_tokens=len(answer.greedy), logprobs=0)
    (choice,) = completion.choices
    answer.check_greedy(token_ids(choice), logprobs(choice))
    assert choice.finish_reason == "length"
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == len(answer.prompt)
    assert completion.usage.completion_tokens == len(answer.greedy)


def test_a_stream_brings_the_same_tokens_one_by_one(client, golden: list[GoldenAnswer]):
    answer = golden[2]
    fields: dict[str, Any] = {"max_tokens": len(answer.greedy), "logprobs": 0}
    stream = client.completions.create(
        **GREEDY | fields,
        prompt=answer.prompt,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=RAW,
    )
    *chunks, last = list(stream)
    answer.check_greedy(
        [token_id for chunk in chunks for token_id in token_ids(chunk.choices[0])],
        [logprob for chunk in chunks for logprob in logprobs(chunk.choices[0])],
    )
    assert len(chunks) == len(answer.greedy)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert not last.choices
    assert last.usage is not None
    assert last.usage.completion_tokens == len(answer.greedy)
    whole = complete(client, answer.prompt, **fields)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_concurrent_requests_of_the_asynchronous_client_are_those_of_transformers(
    server: ServeProcess, golden: list[GoldenAnswer]
):
    async def one(client: openai.AsyncOpenAI, answer: GoldenAnswer) -> None:
        completion = await client.completions.create(
            **GREEDY, prompt=answer.prompt, max_tokens=len(answer.greedy), logprobs=0, extra_body=RAW
        )
        answer.check_greedy(token_ids(completion.choices[0]), logprobs(completion.choices[0]))

    async def main() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=ANSWER_TIMEOUT_S
        ) as client:
            await asyncio.gather(*(one(client, golden[i % 4]) for i in range(12)))

    asyncio.run(asyncio.wait_for(main(), ANSWER_TIMEOUT_S))


@pytest.mark.parametrize("i", [1, 3])
def test_echo_without_output_gives_the_prompts_logprobs(client, golden: list[GoldenAnswer], i: int):
    completion = complete(client, golden[i].prompt, max_tokens=0, echo=True, logprobs=1)
    golden[i].check_prompt(logprobs(completion.choices[0]))
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 0


def test_echo_with_output_gives_the_logprobs_of_both(client, golden: list[GoldenAnswer]):
    answer = golden[1]
    (choice,) = complete(client, answer.prompt, max_tokens=5, echo=True, logprobs=1).choices
    found = logprobs(choice)
    answer.check_prompt(found[: len(answer.prompt)])
    answer.check_greedy(token_ids(choice), found[len(answer.prompt) :])


def test_several_prompts_in_one_request_keep_their_order(client, golden: list[GoldenAnswer]):
    completion = client.completions.create(
        **GREEDY, prompt=[golden[i].prompt for i in (2, 0, 1)], max_tokens=8, extra_body=RAW
    )
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    for choice, i in zip(completion.choices, (2, 0, 1), strict=True):
        golden[i].check_greedy(token_ids(choice))


def test_three_samples_with_a_seed_differ_and_come_again(client, golden: list[GoldenAnswer]):
    fields = {"prompt": golden[1].prompt, "temperature": 1.0, "max_tokens": 12, "seed": 7}
    first, second = (complete(client, **fields, n=3) for _ in range(2))
    samples = [token_ids(choice) for choice in first.choices]
    assert samples == [token_ids(choice) for choice in second.choices]
    assert len({tuple(sample) for sample in samples}) == 3
    assert samples[0] == token_ids(complete(client, **fields).choices[0])


def test_a_seeded_sample_does_not_depend_on_its_batch_mates(server: ServeProcess, client, golden: list[GoldenAnswer]):
    fields = {"model": MODEL, "temperature": 1.0, "top_p": 0.9, "max_tokens": 16}
    alone = token_ids(complete(client, golden[2].prompt, **fields, seed=11).choices[0])

    async def main() -> list[int]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=ANSWER_TIMEOUT_S
        ) as client:
            mates = [
                client.completions.create(**fields, prompt=golden[i % 3].prompt, seed=i, extra_body=RAW)
                for i in range(8)
            ]
            among = client.completions.create(**fields, prompt=golden[2].prompt, seed=11, extra_body=RAW)
            *_, completion = await asyncio.gather(*mates, among)
            return token_ids(completion.choices[0])

    assert asyncio.run(asyncio.wait_for(main(), ANSWER_TIMEOUT_S)) == alone


def test_a_chat_is_the_completion_of_its_rendered_conversation(server: ServeProcess, client):
    messages = [{"role": "user", "content": "the rain in the heat"}]
    _, _, rendered = server.request("POST", "/tokenize", {"messages": messages})
    prompt = json.loads(rendered)["tokens"]
    chat = client.chat.completions.create(
        **GREEDY, messages=messages, max_completion_tokens=8, logprobs=True, top_logprobs=2, extra_body=RAW
    )
    (choice,) = chat.choices
    expected = complete(client, prompt, max_tokens=8, logprobs=2)
    assert token_ids(choice) == token_ids(expected.choices[0])
    assert choice.message.content == expected.choices[0].text
    assert [token.logprob for token in choice.logprobs.content] == pytest.approx(
        logprobs(expected.choices[0]), abs=1e-5
    )
    assert chat.usage.prompt_tokens == len(prompt)


def test_a_chat_streams(client):
    stream = client.chat.completions.create(
        **GREEDY, messages=[{"role": "user", "content": "hi"}], max_tokens=6, stream=True, extra_body=RAW
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert sum(len(token_ids(chunk.choices[0])) for chunk in chunks) == 6
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_stop_string_cuts_the_text_before_it(client):
    whole = complete(client, "the heat is on", max_tokens=24).choices[0].text
    stop = whole[len(whole) // 2 :][:3]
    completion = complete(client, "the heat is on", max_tokens=24, stop=[stop])
    (choice,) = completion.choices
    assert choice.text == whole[: whole.index(stop)]
    assert choice.finish_reason == "stop"
    assert choice.model_extra is not None
    assert choice.model_extra["stop_reason"] == stop
    assert completion.usage is not None
    assert completion.usage.completion_tokens < 24


def test_a_stop_token_ends_a_request(client, golden: list[GoldenAnswer]):
    stop = golden[3].greedy[5]
    (choice,) = complete(client, golden[3].prompt, max_tokens=20, extra={"stop_token_ids": [stop]}).choices
    first = golden[3].greedy.index(stop)
    assert token_ids(choice) == golden[3].greedy[: first + 1]
    assert choice.finish_reason == "stop"


def test_the_models_end_token_ends_a_request(client, golden: list[GoldenAnswer]):
    end = golden[0].greedy.index(1)
    (choice,) = complete(client, golden[0].prompt, max_tokens=48, extra={"ignore_eos": False}).choices
    assert token_ids(choice) == golden[0].greedy[: end + 1]
    assert choice.finish_reason == "stop"


def test_logit_bias_and_penalties_reach_the_sampler(client, golden: list[GoldenAnswer]):
    banned = golden[1].greedy[0]
    (choice,) = complete(client, golden[1].prompt, max_tokens=4, logit_bias={str(banned): -100}).choices
    assert token_ids(choice)[0] != banned
    (choice,) = complete(client, golden[1].prompt, max_tokens=24, presence_penalty=2.0, frequency_penalty=2.0).choices
    repeated = len(golden[1].greedy[:24]) - len(set(golden[1].greedy[:24]))
    assert len(token_ids(choice)) - len(set(token_ids(choice))) <= repeated
    (choice,) = complete(client, golden[1].prompt, max_tokens=4, extra={"top_k": 1}, temperature=5.0).choices
    golden[1].check_greedy(token_ids(choice))
