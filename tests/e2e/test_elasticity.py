"""Elastic execution under plain HTTP traffic, as /metrics tells it; tokens are transformers' all along."""

from __future__ import annotations

import asyncio
import itertools
import random

import openai
import pytest

from tests.e2e.golden_answers import CLOSE_MARGIN, LOGPROB_TOLERANCE, GoldenAnswer
from tests.e2e.serve_process import ANSWER_TIMEOUT_S, Metrics, ServeProcess, wait_until

MODEL = "tiny-llama"
NUM_SLOTS = 96


async def generate(client: openai.AsyncOpenAI, answer: GoldenAnswer, delay_s: float = 0.0) -> None:
    """Streams a golden prompt, and compares."""
    await asyncio.sleep(delay_s)
    stream = await client.completions.create(
        model=MODEL,
        prompt=answer.prompt,
        temperature=0,
        max_tokens=len(answer.greedy),
        logprobs=0,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    token_ids: list[int] = []
    logprobs: list[float] = []
    async for chunk in stream:
        (choice,) = chunk.choices
        assert choice.model_extra is not None
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        token_ids += choice.model_extra["token_ids"]
        logprobs += choice.logprobs.token_logprobs
    assert len(token_ids) == len(answer.greedy)
    answer.check_greedy(token_ids, logprobs)


def connect(server: ServeProcess) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=ANSWER_TIMEOUT_S)


def metrics_when_idle(server: ServeProcess) -> Metrics:
    """Streams may end a moment before the engine has said its last word about them."""
    wait_until(lambda: server.metrics().value("vllm:num_requests_running") == 0, 30.0, "idle")
    metrics = server.metrics()
    assert metrics.by_instance("loongjax_kv_slots") == [NUM_SLOTS] * 3
    assert metrics.by_instance("loongjax_kv_slots_used") == [0.0] * 3
    return metrics


def test_mixed_traffic_scales_up_and_down_and_changes_no_token(server: ServeProcess, golden: list[GoldenAnswer]):
    before = metrics_when_idle(server)
    delays = random.Random(0)

    async def main() -> None:
        async with connect(server) as client:
            await asyncio.gather(*(generate(client, golden[i % 4], delays.uniform(0.0, 0.3)) for i in range(16)))

    asyncio.run(asyncio.wait_for(main(), ANSWER_TIMEOUT_S))
    after = metrics_when_idle(server)
    assert after.iterations("prefill", min_dop=2) > before.iterations("prefill", min_dop=2)
    assert after.iterations("decode", min_dop=2) > before.iterations("decode", min_dop=2)
    assert after.value("loongjax_scale_down_total") > before.value("loongjax_scale_down_total")
    assert after.value("loongjax_recompile_total") >= before.value("loongjax_recompile_total")


def test_a_prompt_longer_than_an_instances_share_is_prefilled_by_several_and_kept_by_few(
    server: ServeProcess, client: openai.OpenAI, golden: list[GoldenAnswer]
):
    before = metrics_when_idle(server)
    asyncio.run(asyncio.wait_for(_generate_alone(server, golden[3]), ANSWER_TIMEOUT_S))
    after = metrics_when_idle(server)
    assert after.iterations("prefill", min_dop=3) == before.iterations("prefill", min_dop=3) + 1
    assert after.value("loongjax_scale_down_total") > before.value("loongjax_scale_down_total")
    assert after.iterations("decode", min_dop=3) == before.iterations("decode", min_dop=3)


async def _generate_alone(server: ServeProcess, answer: GoldenAnswer) -> None:
    async with connect(server) as client:
        await generate(client, answer)


def test_a_request_that_outgrows_its_instance_scales_up_in_its_middle(
    server: ServeProcess, client: openai.OpenAI, golden: list[GoldenAnswer]
):
    """What it generated over two instances is what one prefill finds most probable."""
    answer = golden[2]
    num_tokens = NUM_SLOTS + 20 - len(answer.prompt)
    before = metrics_when_idle(server)
    grown = client.completions.create(
        model=MODEL,
        prompt=answer.prompt,
        temperature=0,
        max_tokens=num_tokens,
        logprobs=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    after = metrics_when_idle(server)
    assert after.value("loongjax_scale_up_total") == before.value("loongjax_scale_up_total") + 1
    assert after.iterations("decode", min_dop=2) > before.iterations("decode", min_dop=2)

    (choice,) = grown.choices
    assert choice.model_extra is not None
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    token_ids = choice.model_extra["token_ids"]
    answer.check_greedy(token_ids, choice.logprobs.token_logprobs)
    scored = client.completions.create(
        model=MODEL, prompt=[*answer.prompt, *token_ids], max_tokens=0, echo=True, logprobs=1
    )
    assert scored.choices[0].logprobs is not None
    assert scored.choices[0].logprobs.token_logprobs is not None
    assert scored.choices[0].logprobs.top_logprobs is not None
    rows = zip(
        choice.logprobs.token_logprobs,
        scored.choices[0].logprobs.token_logprobs[len(answer.prompt) :],
        scored.choices[0].logprobs.top_logprobs[len(answer.prompt) :],
        strict=True,
    )
    for generated, forced, top in rows:
        assert generated == pytest.approx(forced, abs=LOGPROB_TOLERANCE)
        assert forced >= max(top.values()) - CLOSE_MARGIN


def test_short_requests_decode_in_groups_of_their_own_at_the_same_time(
    server: ServeProcess, golden: list[GoldenAnswer]
):
    async def main() -> list[float]:
        async with connect(server) as client:
            tasks = [asyncio.create_task(generate(client, golden[i])) for i in (0, 1, 0)]
            most: list[float] = []
            while not all(task.done() for task in tasks):
                metrics = await asyncio.to_thread(server.metrics)
                most = max(most, [used for used in metrics.by_instance("loongjax_kv_slots_used") if used], key=len)
            await asyncio.gather(*tasks)
            return most

    before = metrics_when_idle(server)
    used = asyncio.run(asyncio.wait_for(main(), ANSWER_TIMEOUT_S))
    after = metrics_when_idle(server)
    assert len(used) >= 2
    num_alone, num_alone_before = (m.iterations("decode") - m.iterations("decode", min_dop=2) for m in (after, before))
    assert num_alone > num_alone_before


def test_two_hundred_streams_of_which_many_go_away_leave_nothing_behind(
    server: ServeProcess, golden: list[GoldenAnswer]
):
    rng = random.Random(1)
    numbers = itertools.count()

    async def one(client: openai.AsyncOpenAI) -> bool:
        """Whether it stayed to the end."""
        answer = golden[next(numbers) % 3]
        max_tokens, patience = rng.randint(2, 10), rng.randint(0, 12)
        stream = await client.completions.create(
            model=MODEL,
            prompt=answer.prompt,
            temperature=0,
            max_tokens=max_tokens,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        token_ids: list[int] = []
        async with stream:
            async for chunk in stream:
                if len(token_ids) >= patience:
                    return False
                assert chunk.choices[0].model_extra is not None
                token_ids += chunk.choices[0].model_extra["token_ids"]
        answer.check_greedy(token_ids)
        assert len(token_ids) == max_tokens
        return True

    async def impatient(client: openai.AsyncOpenAI) -> bool:
        """Goes away before it has heard anything."""
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(one(client), rng.uniform(0.05, 0.3))
        return False

    async def main() -> list[bool]:
        async with connect(server) as client:
            hasty = [impatient(client) for _ in range(20)]
            return await asyncio.gather(*(one(client) for _ in range(180)), *hasty)

    stayed = asyncio.run(asyncio.wait_for(main(), ANSWER_TIMEOUT_S))
    assert 20 < sum(stayed) < 180
    metrics_when_idle(server)
    asyncio.run(asyncio.wait_for(_generate_alone(server, golden[3]), ANSWER_TIMEOUT_S))
