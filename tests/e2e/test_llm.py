"""`LLM` with the real engine: more requests than the pool holds, elastic histories, and errors before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loongjax import LLM, SamplingParams
from loongjax.core.request import FinishReason
from loongjax.engine.outputs import RequestOutput
from loongjax.errors import ContextLengthError, RequestError
from tests.e2e.golden_answers import CLOSE_MARGIN, LOGPROB_TOLERANCE, GoldenAnswer

NUM_INSTANCES = 4
POOL_TOKENS = 4 * 96


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
    max_tokens = (90, 90, 90, 50)
    alone = [llm.generate([golden[i].prompt], greedy(max_tokens[i]), use_tqdm=False)[0] for i in range(4)]
    for i, output in enumerate(alone):
        golden[i].check_greedy(output.token_ids, logprobs(output))
    num_preemptions = llm.stats().num_preemptions

    kinds = [i % 4 for i in range(50)]
    assert sum(len(golden[i].prompt) + max_tokens[i] for i in kinds) > 5 * POOL_TOKENS
    params = [greedy(max_tokens[i]) for i in kinds]
    outputs = llm.generate([golden[i].prompt for i in kinds], params, use_tqdm=False)

    assert llm.stats().num_preemptions > num_preemptions
    assert set(llm.stats().kv_slots_used) == {0}
    for i, output in zip(kinds, outputs, strict=True):
        assert output.finish_reason is FinishReason.LENGTH
        count = num_certain(alone[i])
        assert count > len(golden[i].greedy)
        assert output.token_ids[:count] == alone[i].token_ids[:count]
        assert logprobs(output)[:count] == pytest.approx(logprobs(alone[i])[:count], abs=LOGPROB_TOLERANCE)


def test_prompt_logprobs_are_told_once_and_right_among_preemptions(llm: LLM, golden: list[GoldenAnswer]):
    params = SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True, prompt_logprobs=0)
    num_preemptions = llm.stats().num_preemptions
    outputs = llm.generate([golden[2].prompt] * 16, params, use_tqdm=False)
    assert llm.stats().num_preemptions > num_preemptions
    for output in outputs:
        golden[2].check_greedy(output.token_ids)
        assert output.prompt_logprobs is not None
        golden[2].check_prompt([None, *(item.logprob for item in output.prompt_logprobs)])


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
