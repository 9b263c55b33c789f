"""`LLM` with the real engine: more requests than the pool holds, elastic histories, and errors before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loongjax import LLM, SamplingParams
from loongjax.core.request import FinishReason
from loongjax.engine.outputs import RequestOutput
from loongjax.errors import ContextLengthError, RequestError
from tests.e2e.golden_answers import CLOSE_MARGIN, LOGPROB_TOLERANCE, GoldenAnswer

NUM_INSTANCES = 3
POOL_TOKENS = 3 * 96


@pytest.fixture(scope="module")
def llm(checkpoint: Path, engine_settings: dict[str, Any]) -> Iterator[LLM]:
    with LLM(str(checkpoint), **engine_settings) as llm:
        yield llm


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=2)


def logprobs(output: RequestOutput) -> list[float]:
    assert output.logprobs is not None
    return [item.logprob for item in output.logprobs]


def num_certain(output: RequestOutput) -> int:
    """Tokens before the first of which the two most probable ones are too close to tell."""
    assert output.logprobs is not None
    margins = [item.top[0][1] - item.top[1][1] for item in output.logprobs]
    return next((i for i, margin in enumerate(margins) if margin <= CLOSE_MARGIN), len(margins))


def test_fifty_requests_that_need_five_times_the_pool_have_the_tokens_they_have_alone(
    llm: LLM, golden: list[GoldenAnswer]
):
    lengths = (90, 90, 90, 40)
    alone = [llm.generate([golden[i].prompt], greedy(lengths[i]), use_tqdm=False)[0] for i in range(4)]
    for i, output in enumerate(alone):
        golden[i].check_greedy(output.token_ids, logprobs(output))
    num_preemptions = llm.stats().num_preemptions

    kinds = [i % 4 for i in range(50)]
    max_tokens = [lengths[kind] // (1 + i % 3) for i, kind in enumerate(kinds)]
    needs = sum(len(golden[kind].prompt) + count for kind, count in zip(kinds, max_tokens, strict=True))
    assert needs > 5 * POOL_TOKENS
    params = [dataclasses.replace(greedy(count), prompt_logprobs=0) for count in max_tokens]
    outputs = llm.generate([golden[kind].prompt for kind in kinds], params, use_tqdm=False)

    assert llm.stats().num_preemptions > num_preemptions
    assert set(llm.stats().kv_slots_used) == {0}
    for kind, num_tokens, output in zip(kinds, max_tokens, outputs, strict=True):
        assert output.finish_reason is FinishReason.LENGTH
        assert len(output.token_ids) == num_tokens
        count = min(num_tokens, num_certain(alone[kind]))
        assert output.token_ids[:count] == alone[kind].token_ids[:count]
        assert logprobs(output)[:count] == pytest.approx(logprobs(alone[kind])[:count], abs=LOGPROB_TOLERANCE)
        assert output.prompt_logprobs is not None
        golden[kind].check_prompt([None, *(item.logprob for item in output.prompt_logprobs)])


def test_an_output_tells_its_elastic_history(llm: LLM, golden: list[GoldenAnswer]):
    (output,) = llm.generate([golden[3].prompt], greedy(32), use_tqdm=False)
    golden[3].check_greedy(output.token_ids, logprobs(output))
    prefill, *decodes = output.history
    assert prefill.kind == "prefill"
    assert prefill.dop == NUM_INSTANCES
    assert prefill.num_tokens == len(golden[3].prompt)
    assert {phase.kind for phase in decodes} == {"decode"}
    assert sum(phase.num_tokens for phase in decodes) == 32 - 1
    # Keys of 150 tokens and more need two instances, and no more.
    assert len(prefill.masters) == 2
    assert [phase.instances for phase in decodes] == [prefill.masters]


def test_texts_and_token_ids_may_stand_side_by_side(llm: LLM, golden: list[GoldenAnswer]):
    text, ids = llm.generate(["the heat is on", golden[1].prompt], greedy(8), use_tqdm=False)
    assert text.prompt == "the heat is on"
    assert text.prompt_token_ids[0] == 0, "the tokenizer's beginning of a sequence"
    assert ids.prompt is None
    golden[1].check_greedy(ids.token_ids)
    (again,) = llm.generate([text.prompt_token_ids], greedy(8), use_tqdm=False)
    assert again.token_ids == text.token_ids
    assert again.text == text.text


def test_samples_of_one_prompt_differ_and_come_again(llm: LLM, golden: list[GoldenAnswer]):
    params = SamplingParams(max_tokens=12, seed=3, n=3, ignore_eos=True)
    first, second = (llm.generate([golden[1].prompt], params, use_tqdm=False)[0] for _ in range(2))
    assert [sample.token_ids for sample in first.outputs] == [sample.token_ids for sample in second.outputs]
    assert len({sample.token_ids for sample in first.outputs}) == 3


@pytest.mark.parametrize(
    ("bad", "error"), [([5] * 300, ContextLengthError), ([], RequestError), ([5, 320], RequestError)]
)
def test_one_bad_prompt_is_told_before_anything_runs(
    llm: LLM, golden: list[GoldenAnswer], bad: list[int], error: type[RequestError]
):
    num_iterations = llm.stats().num_iterations
    with pytest.raises(error):
        llm.generate([golden[1].prompt, bad], greedy(4), use_tqdm=False)
    assert llm.stats().num_iterations == num_iterations
