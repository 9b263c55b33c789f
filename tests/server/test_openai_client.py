"""The official client, unmodified."""

from __future__ import annotations

import asyncio

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from server_client import RunningServer
from server_fakes import MAX_MODEL_LEN, SCRIPT, FakeEngine

from loongjax.errors import EngineError, QueueFullError

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
MODEL = "tiny-llama"


@pytest.fixture
def client(server: RunningServer):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models_are_listed_and_found(client: openai.OpenAI):
    model = client.models.list().data[0]
    assert model.id == MODEL
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_completion(client: openai.OpenAI):
    completion = client.completions.create(model=MODEL, prompt="a", max_tokens=4, logprobs=2, seed=1, user="u")
    assert completion.choices[0].text == SCRIPT[:4]
    assert completion.choices[0].finish_reason == "length"
    assert completion.choices[0].logprobs is not None
    assert completion.choices[0].logprobs.tokens == list(SCRIPT[:4])
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 4


def test_a_chat_with_logprobs(client: openai.OpenAI):
    completion = client.chat.completions.create(
        model=MODEL, messages=HI, max_completion_tokens=3, logprobs=True, top_logprobs=1, logit_bias={"5": -1}
    )
    choice = completion.choices[0]
    assert choice.message.content == SCRIPT[:3]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [token.token for token in choice.logprobs.content] == list(SCRIPT[:3])
    assert choice.logprobs.content[0].top_logprobs[0].token == "a"


def test_streams(client: openai.OpenAI):
    stream = client.completions.create(model=MODEL, prompt="a", max_tokens=5, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == SCRIPT[:5]
    chat = client.chat.completions.create(
        model=MODEL, messages=HI, max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(chat)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == SCRIPT[:5]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5


def test_the_streaming_helper(client: openai.OpenAI, server: RunningServer):
    server.engine.eos_after = 4
    with client.chat.completions.stream(model=MODEL, messages=HI) as stream:
        stream.until_done()
        final = stream.get_final_completion()
    assert final.choices[0].message.content == SCRIPT[:4]


def test_errors_are_the_clients_own_classes(client: openai.OpenAI, server: RunningServer):
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model=MODEL, prompt="a", max_tokens=MAX_MODEL_LEN)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")
    server.engine.refuse_with = QueueFullError("full")
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model=MODEL, prompt="a")
    server.engine.is_dead = True
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model=MODEL, prompt="a")


def test_a_full_queue_is_retried_when_the_server_says(server: RunningServer):
    server.engine.refuse_with = QueueFullError("full", retry_after_s=0.05)
    server.engine.num_refusals = 1
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=2) as client:
        assert client.completions.create(model=MODEL, prompt="a", max_tokens=1).choices[0].text == "T"
    assert server.engine.num_tries == 2


def test_an_error_in_mid_stream_is_raised(client: openai.OpenAI, server: RunningServer):
    server.engine.fail_after = (2, lambda: EngineError("device lost"))
    stream = client.chat.completions.create(model=MODEL, messages=HI, stream=True)
    with pytest.raises(openai.APIError, match="device lost"):
        list(stream)


def test_a_wrong_key_is_told(serve):
    server = serve(FakeEngine(), api_key="right")
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong") as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="right") as client:
        assert client.models.list().data[0].id == MODEL


def test_the_asynchronous_client_runs_many_streams_at_once(server: RunningServer):
    server.engine.delay_s = 0.001

    async def one(client: openai.AsyncOpenAI) -> str:
        stream = await client.completions.create(model=MODEL, prompt="a", max_tokens=8, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(one(client) for _ in range(16)))

    assert asyncio.run(main()) == [SCRIPT[:8]] * 16
