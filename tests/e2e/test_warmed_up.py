"""A server that warms up before it is ready, as on GPU: no traffic makes it build or load anything more."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import openai

from tests.e2e.serve_process import ANSWER_TIMEOUT_S, ServeProcess, wait_until

VOCAB_SIZE = 320

ASKED: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1, "seed": 4, "n": 2},
    {"temperature": 1, "top_p": 0.9, "extra_body": {"top_k": 5}},
    {"temperature": 0, "logprobs": 3, "echo": True},
    {"presence_penalty": 1.0, "extra_body": {"repetition_penalty": 1.3}},
    {"logit_bias": {"5": 3}, "extra_body": {"min_tokens": 3}},
)


async def generate_everything(server: ServeProcess) -> None:
    """All sampling, on prompts of one token to more than one instance prefills, of which many run at the same time."""
    draw = random.Random(0)
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=ANSWER_TIMEOUT_S
    ) as client:

        async def generate(prompt_len: int, max_tokens: int, asked: dict[str, Any]) -> None:
            prompt = [draw.randrange(5, VOCAB_SIZE) for _ in range(prompt_len)]
            await client.completions.create(model="tiny-llama", prompt=prompt, max_tokens=max_tokens, **asked)

        await asyncio.gather(
            *(generate(draw.choice((1, 9, 40, 90)), draw.choice((3, 12, 36)), ASKED[i % len(ASKED)]) for i in range(30))
        )


def test_elastic_traffic_after_a_warm_up_builds_and_loads_nothing(serve: Callable[..., ServeProcess]):
    server = serve(tp=1, num_instances=2, max_num_seqs=2, warm_up=True)
    assert "warmed up 3 groups" in server.log
    asyncio.run(asyncio.wait_for(generate_everything(server), ANSWER_TIMEOUT_S))
    wait_until(lambda: server.metrics().value("vllm:num_requests_running") == 0, 30.0, "idle")
    metrics = server.metrics()
    for phase in ("prefill", "decode"):
        assert 0 < metrics.iterations(phase, min_dop=2) < metrics.iterations(phase)
    assert metrics.value("loongjax_scale_up_total") > 0
    assert metrics.value("loongjax_scale_down_total") > 0
    assert metrics.value("loongjax_recompile_total") == 0
