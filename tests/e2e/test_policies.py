"""The real engine under every policy: whoever decides, the tokens are those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loongjax import LLM, SamplingParams
from loongjax.config import POLICIES
from loongjax.errors import ContextLengthError
from tests.e2e.golden_answers import GoldenAnswer

MAX_TOKENS = 12


@pytest.mark.parametrize("name", POLICIES)
def test_the_tokens_do_not_depend_on_the_policy(
    name: str, checkpoint: Path, engine_settings: dict[str, Any], golden: list[GoldenAnswer]
):
    num_instances = 1 if name == "prefill-first" else engine_settings["num_instances"]
    # Twice, so that more of them wait than run; short enough for one instance.
    answers = 2 * [answer for answer in golden if len(answer.prompt) <= 48]
    assert len(answers) > 4
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=0)
    with LLM(str(checkpoint), policy=name, **engine_settings | {"num_instances": num_instances}) as llm:
        outputs = llm.generate([answer.prompt for answer in answers], sampling, use_tqdm=False)
        assert set(llm.stats().kv_slots_used) == {0}
    for answer, output in zip(answers, outputs, strict=True):
        assert output.logprobs is not None
        answer.check_greedy(output.token_ids, [item.logprob for item in output.logprobs])


@pytest.mark.parametrize("chunk_tokens", [1, 7])
def test_the_tokens_do_not_depend_on_how_prompts_are_cut(
    chunk_tokens: int, checkpoint: Path, engine_settings: dict[str, Any], golden: list[GoldenAnswer]
):
    """On a pool that forces preemptions, with a request among them that is prefilled whole."""
    answers = 2 * [answer for answer in golden if len(answer.prompt) <= 48]
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=0)
    scored = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    settings = engine_settings | {"num_instances": 1, "policy": "chunked", "chunk_tokens": chunk_tokens}
    with LLM(str(checkpoint), **settings) as llm:
        prompts = [answer.prompt for answer in answers]
        outputs = llm.generate(prompts, [scored, *[sampling] * (len(answers) - 1)], use_tqdm=False)
        assert set(llm.stats().kv_slots_used) == {0}
    for answer, output in zip(answers, outputs, strict=True):
        assert output.logprobs is not None
        answer.check_greedy(output.token_ids, [item.logprob for item in output.logprobs])
    assert {phase.kind for phase in outputs[0].history} == {"prefill", "decode"}
    assert all({phase.kind for phase in output.history} == {"extend", "decode"} for output in outputs[1:])


@pytest.mark.parametrize("chunk_tokens", [7, 512])
def test_prompts_several_times_longer_than_a_prefill_are_computed_in_chunks(
    chunk_tokens: int, checkpoint: Path, engine_settings: dict[str, Any], golden: list[GoldenAnswer]
):
    """On a pool that holds the longest of them and no more."""
    assert max(len(answer.prompt) for answer in golden) > 4 * engine_settings["max_num_batched_tokens"]
    settings = engine_settings | {"num_instances": 1, "num_slots": 320, "policy": "chunked"}
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=0)
    with LLM(str(checkpoint), **settings, chunk_tokens=chunk_tokens) as llm:
        outputs = llm.generate([answer.prompt for answer in golden], sampling, use_tqdm=False)
        assert set(llm.stats().kv_slots_used) == {0}
        scored = SamplingParams(max_tokens=MAX_TOKENS, prompt_logprobs=0)
        with pytest.raises(ContextLengthError, match="in one piece, of at most 64 tokens, but this one has 300"):
            llm.generate([golden[4].prompt], scored, use_tqdm=False)
    for answer, output in zip(golden, outputs, strict=True):
        assert output.logprobs is not None
        answer.check_greedy(output.token_ids, [item.logprob for item in output.logprobs])
        assert {phase.kind for phase in output.history} == {"extend", "decode"}
