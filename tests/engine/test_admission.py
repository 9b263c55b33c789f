"""What comes through the door, and what does not."""

from __future__ import annotations

import dataclasses
import random
import re
from typing import Any

import pytest

from loongjax.core.request import NO_SLO, Request, ServiceLevel
from loongjax.core.sampling import MAX_SEED, SamplingParams
from loongjax.engine.admission import admit, check_capacity, sample_seed
from loongjax.engine.client import ModelInfo
from loongjax.errors import ConfigError, ContextLengthError, RequestError
from tests.engine.cluster import Cluster
from tests.engine.fake_runtime import EOS, VOCAB_SIZE

INFO = Cluster(max_model_len=100).info
CUTTING = dataclasses.replace(INFO, max_whole_prompt_len=40)
"""An engine that computes prompts in chunks, and 40 tokens in one piece."""


def admitted(prompt: list[int], info: ModelInfo = INFO, **sampling: Any) -> tuple[Request, ...]:
    return admit(prompt, SamplingParams(**sampling), request_id="r", info=info, seeds=random.Random(0))


def test_every_sample_becomes_a_request() -> None:
    requests = admitted([1, 2], n=3)
    assert [request.request_id for request in requests] == ["r/0", "r/1", "r/2"]
    assert {request.prompt_token_ids for request in requests} == {(1, 2)}


def test_samples_of_a_seed_differ_and_can_be_had_again() -> None:
    seeds = [request.seed for request in admitted([1], n=4, seed=7)]
    assert len(set(seeds)) == 4
    assert seeds == [request.seed for request in admitted([1], n=4, seed=7)]


def test_the_first_sample_is_the_only_one_of_n_equal_to_1() -> None:
    assert admitted([1], n=4, seed=7)[0].seed == admitted([1], seed=7)[0].seed == 7


def test_requests_without_a_seed_get_fresh_ones() -> None:
    seeds = random.Random(0)
    params = SamplingParams()
    drawn = [admit([1], params, request_id="r", info=INFO, seeds=seeds)[0].seed for _ in range(100)]
    assert len(set(drawn)) == 100


@pytest.mark.parametrize("seed", [-MAX_SEED - 1, -1, 0, MAX_SEED])
def test_every_seed_that_may_be_asked_for_gives_seeds_in_range(seed: int) -> None:
    assert all(-MAX_SEED - 1 <= sample_seed(seed, index) <= MAX_SEED for index in range(5))


def test_no_limit_means_what_the_context_holds() -> None:
    (request,) = admitted([1] * 30, max_tokens=None)
    assert request.max_tokens == 70


def test_the_context_can_be_used_up() -> None:
    (request,) = admitted([1] * 30, max_tokens=70)
    assert request.max_tokens == 70
    (request,) = admitted([1] * 100, max_tokens=0)
    assert request.max_tokens == 0


@pytest.mark.parametrize(
    ("num_prompt_tokens", "sampling", "param"),
    [
        (101, {"max_tokens": 0}, "prompt"),
        (101, {"max_tokens": None}, "prompt"),
        (100, {"max_tokens": None}, "prompt"),
        (95, {"max_tokens": None, "min_tokens": 6}, "prompt"),
        (30, {"max_tokens": 71}, "max_tokens"),
    ],
)
def test_what_the_context_cannot_hold_is_refused(num_prompt_tokens: int, sampling: dict[str, Any], param: str) -> None:
    with pytest.raises(ContextLengthError, match="maximum context length is 100 tokens") as caught:
        admitted([1] * num_prompt_tokens, **sampling)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("sampling", "what"),
    [
        ({"prompt_logprobs": 0}, "whose log-probabilities are wanted .* do without prompt log-probabilities"),
        ({"max_tokens": 0}, r"without output \(max_tokens is 0\) .* ask for a token"),
    ],
)
def test_a_long_prompt_that_cannot_be_cut_is_refused(sampling: dict[str, Any], what: str) -> None:
    admitted([1] * 40, CUTTING, **sampling)
    admitted([1] * 41, INFO, **sampling)
    with pytest.raises(ContextLengthError, match="in one piece, of at most 40 tokens, but this one has 41") as caught:
        admitted([1] * 41, CUTTING, **sampling)
    assert re.search(what, str(caught.value))
    assert caught.value.param == "prompt"


def test_a_long_prompt_that_can_be_cut_is_not() -> None:
    admitted([1] * 99, CUTTING, max_tokens=1, logprobs=3)


def test_only_prompts_in_one_piece_have_to_fit_a_prefill() -> None:
    cluster = Cluster(num_instances=1, num_pages=25, page_size=4, max_num_batched_tokens=40)
    check_capacity(CUTTING, cluster.shape, cluster.runtime().limits)
    for info in (INFO, dataclasses.replace(CUTTING, max_whole_prompt_len=41)):
        with pytest.raises(ConfigError, match="all instances together prefill 40"):
            check_capacity(info, cluster.shape, cluster.runtime().limits)


@pytest.mark.parametrize(
    ("prompt", "sampling", "param"),
    [
        ([], {}, "prompt"),
        ([1, -1], {}, "prompt"),
        ([VOCAB_SIZE], {}, "prompt"),
        ([1], {"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias"),
        ([1], {"stop_token_ids": (VOCAB_SIZE,)}, "stop_token_ids"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(prompt: list[int], sampling: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        admitted(prompt, **sampling)
    assert caught.value.param == param


def test_eos_stops_unless_it_is_ignored_and_stop_tokens_always_do() -> None:
    assert admitted([1], stop_token_ids=(5,))[0].stop_token_ids == {EOS, 5}
    assert admitted([1], stop_token_ids=(5,), ignore_eos=True)[0].stop_token_ids == {5}


def test_every_sample_has_the_priority_and_the_wishes_of_its_request() -> None:
    slo = ServiceLevel(ttft_s=0.5)
    requests = admit([1], SamplingParams(n=2), request_id="r", info=INFO, seeds=random.Random(0), priority=-2, slo=slo)
    assert [(request.priority, request.slo) for request in requests] == [(-2, slo)] * 2
    assert (admitted([1])[0].priority, admitted([1])[0].slo) == (0, NO_SLO)
