"""Offline generation over the fake runtime."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from loongjax.core.iteration import Iteration, PrefillIteration
from loongjax.core.plan import Plan
from loongjax.core.request import NO_SLO, FinishReason, ServiceLevel
from loongjax.core.sampling import SamplingParams
from loongjax.engine.core import EngineCore
from loongjax.engine.llm import LLM
from loongjax.engine.outputs import SampleResult
from loongjax.engine.parts import EngineParts
from loongjax.errors import ContextLengthError, EngineDeadError, RequestError
from loongjax.scheduler.simple import SimplePolicy
from loongjax.scheduler.view import ClusterView
from tests.engine.cluster import Cluster, assert_nothing_leaks
from tests.engine.fake_runtime import expected_tokens
from tests.engine.hosted import LetterTokenizer

CLUSTER = Cluster()
GREEDY = SamplingParams(max_tokens=12, seed=1, ignore_eos=True)


def llm(core: EngineCore | None = None) -> LLM:
    return LLM.from_parts(EngineParts(core or CLUSTER.core(), LetterTokenizer()), seed=3)


def test_one_text_gives_one_output_with_everything_in_it() -> None:
    [output] = llm().generate(
        "ABCDE", dataclasses.replace(GREEDY, logprobs=0, prompt_logprobs=0, skip_special_tokens=False), use_tqdm=False
    )
    assert output.prompt == "ABCDE"
    assert output.prompt_token_ids == (17, 18, 19, 20, 21)
    assert len(output.token_ids) == 12
    assert output.text == LetterTokenizer().decode(output.token_ids)
    assert output.logprobs is not None
    assert [item.token_id for item in output.logprobs] == list(output.token_ids)
    assert output.prompt_logprobs is not None
    assert [item.token_id for item in output.prompt_logprobs] == [18, 19, 20, 21]
    assert (output.finish_reason, output.stop_reason) == (FinishReason.LENGTH, None)
    assert [(phase.kind, phase.num_tokens) for phase in output.history] == [("prefill", 5), ("decode", 11)]


def test_outputs_come_in_the_order_of_the_prompts_whatever_ends_first() -> None:
    prompts = [[1 + i % 50] * (1 + 13 * i % 60) for i in range(30)]
    params = [dataclasses.replace(GREEDY, max_tokens=1 + 7 * i % 20) for i in range(30)]
    outputs = llm().generate(prompts, params, use_tqdm=False)
    for prompt, sampling, output in zip(prompts, params, outputs, strict=True):
        request = dataclasses.replace(
            CLUSTER.request("x", 1, sampling.max_tokens or 0), prompt_token_ids=tuple(prompt), seed=1
        )
        assert output.prompt_token_ids == tuple(prompt)
        assert output.token_ids == expected_tokens(request)


def test_more_prompts_than_the_queue_holds_are_fed_as_it_empties() -> None:
    core = dataclasses.replace(CLUSTER, max_queue_len=2).core()
    outputs = llm(core).generate([[1, 2]] * 20, GREEDY, use_tqdm=False)
    assert len({output.token_ids for output in outputs}) == 1
    assert_nothing_leaks(core)


def test_threads_take_turns_often_while_it_generates_and_as_before_afterwards(monkeypatch) -> None:
    core = CLUSTER.core()
    step, intervals_s = core.step, []

    def step_and_look(timeout_s: float | None) -> Any:
        intervals_s.append(sys.getswitchinterval())
        return step(timeout_s)

    monkeypatch.setattr(core, "step", step_and_look)
    before_s = sys.getswitchinterval()
    llm(core).generate("AB", GREEDY, use_tqdm=False)
    assert intervals_s
    assert max(intervals_s) < 0.001 < before_s
    assert sys.getswitchinterval() == before_s


def test_samples_of_a_prompt_differ_and_a_seed_brings_them_back() -> None:
    params = dataclasses.replace(GREEDY, n=3)
    [first], [again] = (llm().generate("AB", params, use_tqdm=False) for _ in range(2))
    assert [sample.index for sample in first.outputs] == [0, 1, 2]
    assert len({sample.token_ids for sample in first.outputs}) == 3
    assert [sample.token_ids for sample in first.outputs] == [sample.token_ids for sample in again.outputs]


def test_a_stop_string_ends_a_sample_and_frees_its_pages() -> None:
    core = CLUSTER.core()
    [whole] = llm().generate("AB", GREEDY, use_tqdm=False)
    stop = whole.text[4:6]
    [output] = llm(core).generate("AB", dataclasses.replace(GREEDY, stop=(stop,)), use_tqdm=False)
    assert output.text == whole.text[: whole.text.index(stop)]
    assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, stop)
    assert output.history[0].kind == "prefill"
    assert_nothing_leaks(core)


def test_without_parameters_the_checkpoints_recommendation_holds() -> None:
    runtime = CLUSTER.runtime()
    core = CLUSTER.core(runtime)
    core.info = dataclasses.replace(core.info, default_sampling={"temperature": 0.0, "top_k": 5})
    llm(core).generate("AB", use_tqdm=False)
    prefill = runtime.submitted[0]
    assert isinstance(prefill, PrefillIteration)
    sampling = prefill.inputs[0].request.sampling
    assert (sampling.temperature, sampling.top_k) == (0.0, 5)


@pytest.mark.parametrize(
    ("prompts", "params", "error"),
    [
        (["AB", ""], GREEDY, RequestError),
        ([[1], [1] * 127], GREEDY, ContextLengthError),
        (["AB"], [GREEDY, GREEDY], RequestError),
        ([1, 2, 64], GREEDY, RequestError),
    ],
)
def test_an_error_in_any_prompt_is_raised_before_anything_runs(prompts: Any, params: Any, error: type) -> None:
    runtime = CLUSTER.runtime()
    with pytest.raises(error):
        llm(CLUSTER.core(runtime)).generate(prompts, params, use_tqdm=False)
    assert runtime.submitted == []


def test_ctrl_c_leaves_an_engine_that_still_works() -> None:
    def interrupt_once(iteration: Iteration) -> float:
        if iteration.iteration_id == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return 1.0

    core = CLUSTER.core(CLUSTER.runtime(duration_s=interrupt_once))
    engine = llm(core)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1, 2]] * 4, GREEDY, use_tqdm=False)
    assert core.is_idle
    assert_nothing_leaks(core)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(engine.generate("AB", GREEDY, use_tqdm=False)[0].token_ids) == 12


def test_a_dead_engine_raises() -> None:
    core = CLUSTER.core(CLUSTER.runtime(fails=lambda iteration: iteration.iteration_id >= 3))
    with pytest.raises(EngineDeadError, match="fail even without a request: injected failure"):
        llm(core).generate(["AB", "CD", "EF"], GREEDY, use_tqdm=False)


def test_a_list_of_ids_is_one_prompt() -> None:
    [output] = llm().generate([17, 18], GREEDY, use_tqdm=False)
    assert (output.prompt, output.prompt_token_ids) == (None, (17, 18))
    assert output.token_ids == llm().generate("AB", GREEDY, use_tqdm=False)[0].token_ids


def test_no_prompts_give_no_outputs() -> None:
    assert llm().generate([], use_tqdm=False) == []
    assert llm().generate(iter([]), use_tqdm=False) == []


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (np.array([17, 18]), [(17, 18)]),
        (np.array([[17, 18], [19, 20]], np.uint8), [(17, 18), (19, 20)]),
        ([np.int64(17), np.int32(18)], [(17, 18)]),
        ([np.array([17]), [np.int64(18)], "C"], [(17,), (18,), (19,)]),
        (jnp.array([17, 18]), [(17, 18)]),
        ([jnp.array([17, 18]), jnp.array([19])], [(17, 18), (19,)]),
        (("A" * i for i in (1, 2)), [(17,), (17, 17)]),
        (range(17, 20), [(17, 18, 19)]),
        (np.array(["A", "B"]), [(17,), (18,)]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_prompts_may_be_arrays_and_generators(users_types: None, prompts: Any, expected: list[tuple[int, ...]]) -> None:
    outputs = llm().generate(prompts, GREEDY, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == expected
    assert {type(token_id) for output in outputs for token_id in output.prompt_token_ids} == {int}


def test_params_priorities_and_wishes_may_come_from_arrays_and_generators(users_types: None) -> None:
    spy, slo = Spy(), ServiceLevel(ttft_s=1.0)
    params = (dataclasses.replace(GREEDY, max_tokens=count) for count in (3, 4))
    outputs = llm(CLUSTER.core(policy=spy)).generate(
        ["A", "B"], params, use_tqdm=False, priority=np.array([3, -1]), slo=(wish for wish in (NO_SLO, slo))
    )
    assert [len(output.token_ids) for output in outputs] == [3, 4]
    assert spy.seen == {"prompt-0/0": (3, NO_SLO), "prompt-1/0": (-1, slo)}


EACH = "or a list of one for each prompt"


@pytest.mark.parametrize(
    ("prompts", "given", "complaint"),
    [
        ([[1.7, 5.2]], {}, "prompt must be a list of integers, got one that holds 1.7 (float)"),
        (np.array([[1.7]]), {}, "prompt must be a list of integers, got one that holds 1.7 (float)"),
        ([[1, True]], {}, "prompt must be a list of integers, got one that holds True (bool)"),
        (
            [1.7],
            {},
            "prompts must be a text, a list of token ids, or a list of such prompts, got one that holds 1.7 (float)",
        ),
        (
            [True],
            {},
            "prompts must be a text, a list of token ids, or a list of such prompts, got one that holds True (bool)",
        ),
        (None, {}, "prompts must be a text, a list of token ids, or a list of such prompts, got None (NoneType)"),
        (
            {"prompt": "A"},
            {},
            "prompts must be a text, a list of token ids, or a list of such prompts, got {'prompt': 'A'} (dict)",
        ),
        ([{"prompt": "A"}], {}, "prompt must be a list of integers, got {'prompt': 'A'} (dict)"),
        ([1, "A"], {}, "token ids stand among the prompts: put each prompt's into a list of its own"),
        ("A", {"params": {"max_tokens": 5}}, f"params must be SamplingParams, {EACH}, got {{'max_tokens': 5}} (dict)"),
        ("A", {"params": [None]}, f"params must be SamplingParams, {EACH}, got one that holds None (NoneType)"),
        ("A", {"priority": 1.5}, f"priority must be int, {EACH}, got 1.5 (float)"),
        ("A", {"priority": [True]}, f"priority must be int, {EACH}, got one that holds True (bool)"),
        ("A", {"priority": 2**63}, "priority must be from -2**63 to 2**63 - 1, got 9223372036854775808"),
        ("A", {"slo": 0.2}, f"slo must be ServiceLevel, {EACH}, got 0.2 (float)"),
    ],
)
def test_anything_else_is_refused_in_words(
    users_types: None, prompts: Any, given: dict[str, Any], complaint: str
) -> None:
    runtime = CLUSTER.runtime()
    with pytest.raises(RequestError) as caught:
        llm(CLUSTER.core(runtime)).generate(prompts, use_tqdm=False, **given)
    assert str(caught.value) == complaint
    assert caught.value.param == complaint.split()[0] or complaint.startswith("token ids")
    assert runtime.submitted == []


def test_a_sample_whose_iterations_fail_ends_with_the_error_beside_those_that_do_not() -> None:
    def fails(iteration: Iteration) -> bool:
        return isinstance(iteration, PrefillIteration) and any(
            item.request.request_id == "prompt-1/0" for item in iteration.inputs
        )

    fine, failed = llm(CLUSTER.core(CLUSTER.runtime(fails=fails))).generate(["A", "B"], GREEDY, use_tqdm=False)
    assert (fine.finish_reason, fine.error, len(fine.token_ids)) == (FinishReason.LENGTH, None, 12)
    assert (failed.finish_reason, failed.index, failed.token_ids) == (FinishReason.ERROR, 0, ())
    assert failed.error is not None
    assert "injected failure" in failed.error


def test_the_fields_of_a_sample_are_those_of_an_output_of_one_sample() -> None:
    [output] = llm().generate("AB", GREEDY, use_tqdm=False)
    for field in dataclasses.fields(SampleResult):
        assert getattr(output, field.name) == getattr(output.outputs[0], field.name)


def test_the_progress_bar_counts_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    llm().generate(["AB", "CD"], GREEDY)
    assert "2/2" in capsys.readouterr().err


def test_leaving_the_block_closes_the_engine() -> None:
    runtime = CLUSTER.runtime()
    with llm(CLUSTER.core(runtime)) as engine:
        engine.generate("AB", GREEDY, use_tqdm=False)
        assert engine.stats().num_generation_tokens == 12
    assert runtime.is_closed


def test_a_closed_engine_can_be_closed_again_and_generates_nothing() -> None:
    engine = llm()
    engine.close()
    engine.close()
    with pytest.raises(EngineDeadError, match="the engine was closed"):
        engine.generate("AB", GREEDY, use_tqdm=False)


class Spy(SimplePolicy):
    """Notes what the waiting requests ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, tuple[int, ServiceLevel]] = {}

    def plan(self, view: ClusterView) -> tuple[Plan, ...]:
        self.seen |= {request.request_id: (request.priority, request.slo) for request in view.waiting}
        return super().plan(view)


def test_priorities_and_wishes_reach_the_policy_one_for_all_or_one_each() -> None:
    spy, slo = Spy(), ServiceLevel(ttft_s=1.0, tpot_s=0.1)
    llm(CLUSTER.core(policy=spy)).generate(["A", "B"], GREEDY, use_tqdm=False, priority=[3, -1], slo=slo)
    assert spy.seen == {"prompt-0/0": (3, slo), "prompt-1/0": (-1, slo)}


def test_without_them_there_is_no_wish() -> None:
    spy = Spy()
    llm(CLUSTER.core(policy=spy)).generate("A", GREEDY, use_tqdm=False)
    assert list(spy.seen.values()) == [(0, NO_SLO)]


@pytest.mark.parametrize("given", [{"priority": [1]}, {"slo": [NO_SLO] * 3}])
def test_one_each_means_as_many_as_prompts(given: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"there are 2 prompts but . of {next(iter(given))}"):
        llm().generate(["A", "B"], GREEDY, use_tqdm=False, **given)
