"""Prefills and decodes are submitted behind each other before the tokens of the first are there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest

from loongjax.core.iteration import (
    DecodeIteration,
    ExtendIteration,
    Iteration,
    PrefillIteration,
    RecoverIteration,
)
from loongjax.core.plan import Plan
from loongjax.core.request import FinishReason, Request
from loongjax.engine import advice
from loongjax.engine.core import EngineCore
from loongjax.scheduler.baselines.batching_config import BatchingConfig
from loongjax.scheduler.baselines.chunked import ChunkedPolicy
from loongjax.scheduler.baselines.static import StaticPolicy
from loongjax.scheduler.observation import Observation
from loongjax.scheduler.policy import Policy
from loongjax.scheduler.view import ClusterView
from tests.engine.cluster import Cluster, Journal, assert_nothing_leaks, run
from tests.engine.fake_runtime import EOS, FakeRuntime, expected_tokens

CLUSTER = Cluster(num_instances=1, num_pages=64, max_model_len=64, prefill_tokens_per_instance=64)


class Noting:
    """A policy that notes what it is asked about; its copies do so too."""

    def __init__(self, policy: Policy, views: list[ClusterView]) -> None:
        self._policy = policy
        self._views = views

    def plan(self, view: ClusterView) -> tuple[Plan, ...]:
        self._views.append(view)
        return self._policy.plan(view)

    def observe(self, observations: Sequence[Observation]) -> None:
        self._policy.observe(observations)

    def copy(self) -> Noting:
        return Noting(self._policy.copy(), self._views)


def members(iteration: Iteration) -> list[str]:
    match iteration:
        case PrefillIteration() | ExtendIteration():
            requests = [item.request for item in iteration.inputs]
        case DecodeIteration():
            requests = [item.request for batch in iteration.sub_batches for item in batch.inputs]
        case _:
            requests = []
    return [request.request_id.removesuffix("/0") for request in requests]


def awaited(iteration: Iteration) -> list[str]:
    match iteration:
        case ExtendIteration():
            requests = [item.request for item in iteration.inputs if item.is_awaited]
        case DecodeIteration():
            requests = [item.request for batch in iteration.sub_batches for item in batch.inputs if item.is_awaited]
        case _:
            requests = []
    return [request.request_id.removesuffix("/0") for request in requests]


def kinds(runtime: FakeRuntime) -> str:
    """A letter for each iteration: p, e, r, d for a decode that begins, c for one that continues."""
    letters = {PrefillIteration: "p", ExtendIteration: "e", RecoverIteration: "r"}
    return "".join(
        "dc"[iteration.continues] if isinstance(iteration, DecodeIteration) else letters[type(iteration)]
        for iteration in runtime.submitted
    )


def step_until(core: EngineCore, journal: Journal, is_so: Callable[[], bool]) -> None:
    for _ in range(1000):
        if is_so():
            return
        assert not core.is_idle
        journal.write(core.step(1.0))
    raise AssertionError("it is never so")


def finish(core: EngineCore, journal: Journal, *requests: Request) -> None:
    run(core, journal)
    for request in requests:
        journal.check(request)
    assert_nothing_leaks(core)


def test_a_prompt_that_comes_is_prefilled_behind_a_decode_and_joins_it_behind_the_prefill() -> None:
    runtime = CLUSTER.runtime()
    core, journal = CLUSTER.core(runtime), Journal()
    first, second = CLUSTER.request("first", 8, 20), CLUSTER.request("second", 8, 20)
    core.add(first)
    step_until(core, journal, lambda: kinds(runtime) == "pdccc")
    core.add(second)
    # The step in flight has another behind it already; behind that one the prompt, before its tokens are there.
    step_until(core, journal, lambda: kinds(runtime) == "pdcccp")
    assert len(journal.tokens["first/0"]) == 4
    step_until(core, journal, lambda: kinds(runtime) == "pdcccpd")
    assert "second/0" not in journal.tokens
    assert (members(runtime.submitted[-1]), awaited(runtime.submitted[-1])) == (["first", "second"], ["second"])
    finish(core, journal, first, second)
    # Twenty tokens of the second behind four steps and the prefill of the first: the devices never stood still.
    # Once the first has ended, a smaller bucket of rows does.
    assert kinds(runtime) == "pdccc" + "pd" + "c" * 14 + "dccc"
    assert runtime.now_s() == len(runtime.submitted)


def test_without_running_ahead_nothing_is_awaited() -> None:
    cluster = dataclasses.replace(CLUSTER, run_ahead=False)
    runtime = cluster.runtime()
    core = cluster.core(runtime)
    requests = [cluster.request(f"r{i}", 8, 4 + i) for i in range(3)]
    core.add(*requests)
    finish(core, Journal(), *requests)
    assert runtime.max_in_flight == 1
    assert not any(awaited(iteration) for iteration in runtime.submitted)


def test_who_ends_by_the_prefill_is_not_in_the_decode_behind_it() -> None:
    runtime = CLUSTER.runtime()
    core = CLUSTER.core(runtime)
    requests = [CLUSTER.request("one", 8, 1), CLUSTER.request("echo", 8, 0, prompt_logprobs=0)]
    requests.append(CLUSTER.request("more", 8, 3))
    core.add(*requests)
    finish(core, Journal(), *requests)
    assert [members(iteration) for iteration in runtime.submitted] == [["one", "echo", "more"], ["more"], ["more"]]
    assert runtime.now_s() == 3.0


def test_nothing_follows_a_prefill_whose_requests_all_end_by_it() -> None:
    runtime = CLUSTER.runtime()
    core = CLUSTER.core(runtime)
    requests = [CLUSTER.request("one", 8, 1), CLUSTER.request("echo", 8, 0, prompt_logprobs=0)]
    core.add(*requests)
    finish(core, Journal(), *requests)
    assert kinds(runtime) == "p"


def stopping_at_once() -> Request:
    for seed in range(10_000):
        request = dataclasses.replace(CLUSTER.request("stops", 5, 40), seed=seed, stop_token_ids=frozenset([EOS]))
        if len(expected_tokens(request)) == 1:
            return request
    raise AssertionError("no seed does that")


def test_who_meets_a_stop_token_at_once_ignores_the_token_of_the_decode_behind() -> None:
    runtime = CLUSTER.runtime()
    core, journal = CLUSTER.core(runtime), Journal()
    requests = [stopping_at_once(), CLUSTER.request("goes on", 8, 5)]
    core.add(*requests)
    finish(core, journal, *requests)
    assert journal.last["stops/0"].finish_reason is FinishReason.STOP
    assert awaited(runtime.submitted[1]) == ["stops", "goes on"]


def test_penalties_wait_for_the_first_token() -> None:
    runtime = CLUSTER.runtime()
    core, journal = CLUSTER.core(runtime), Journal()
    request = CLUSTER.request("penalised", 8, 6, presence_penalty=0.5)
    core.add(request)
    step_until(core, journal, lambda: "d" in kinds(runtime))
    assert len(journal.tokens[request.request_id]) == 1
    finish(core, journal, request)
    assert not awaited(runtime.submitted[1])


@pytest.mark.parametrize("in_flight", ["pd", "pdcccp", "pdcccpd"])
@pytest.mark.parametrize("name", ["first", "second"])
def test_an_abort_leaves_nothing_behind(in_flight: str, name: str) -> None:
    runtime = CLUSTER.runtime()
    core, journal = CLUSTER.core(runtime), Journal()
    first, second = CLUSTER.request("first", 8, 20), CLUSTER.request("second", 8, 20)
    core.add(first)
    step_until(core, journal, lambda: kinds(runtime) == in_flight[:5])
    core.add(second)
    step_until(core, journal, lambda: kinds(runtime).startswith(in_flight))
    core.abort(f"{name}/0")
    core.check_integrity()
    finish(core, journal, first, second)
    assert journal.last[f"{name}/0"].finish_reason is FinishReason.ABORT


@pytest.mark.parametrize("failing", range(8))
def test_whatever_fails_takes_what_is_behind_it_along_and_nobody_loses_a_token(failing: int) -> None:
    """Each iteration once: prefills and decodes, whatever is before or behind them."""
    runtime = CLUSTER.runtime(fails=lambda iteration: iteration.iteration_id == failing)
    core, journal = CLUSTER.core(runtime), Journal()
    first, second = CLUSTER.request("first", 8, 20), CLUSTER.request("second", 8, 20)
    core.add(first)
    step_until(core, journal, lambda: kinds(runtime) == "pdccc" or "r" in kinds(runtime))
    core.add(second)
    finish(core, journal, first, second)
    assert kinds(runtime).count("r") == 1
    for request in (first, second):
        assert journal.last[request.request_id].finish_reason is FinishReason.LENGTH


def test_who_has_no_keys_and_was_behind_what_failed_starts_again() -> None:
    runtime = CLUSTER.runtime(fails=lambda iteration: iteration.iteration_id == 4)
    core, journal = CLUSTER.core(runtime), Journal()
    first, echo = CLUSTER.request("first", 8, 20), CLUSTER.request("echo", 8, 0, prompt_logprobs=0)
    core.add(first)
    step_until(core, journal, lambda: kinds(runtime) == "pdccc")
    core.add(echo)
    finish(core, journal, first, echo)
    assert kinds(runtime).startswith("pdcccpr")


def slow_behind_a_failure(iteration: Iteration) -> float:
    return 150.0 if iteration.iteration_id == 5 else 1.0


def test_a_recovery_behind_something_long_is_given_its_time() -> None:
    runtime = CLUSTER.runtime(fails=lambda iteration: iteration.iteration_id == 4, duration_s=slow_behind_a_failure)
    core, journal = CLUSTER.core(runtime), Journal()
    first, second = CLUSTER.request("first", 8, 20), CLUSTER.request("second", 8, 20)
    core.add(first)
    step_until(core, journal, lambda: kinds(runtime) == "pdccc")
    core.add(second)
    finish(core, journal, first, second)
    assert kinds(runtime).startswith("pdcccpr")
    assert runtime.now_s() > 150.0


def test_what_waits_behind_another_iteration_is_not_overdue() -> None:
    cluster = dataclasses.replace(CLUSTER, iteration_timeout_s=10.0)
    runtime = cluster.runtime(duration_s=lambda iteration: 8.0)
    core, journal = cluster.core(runtime), Journal()
    first, second = cluster.request("first", 8, 6), cluster.request("second", 8, 6)
    core.add(first)
    core.add(second)
    while not core.is_idle:
        journal.write(core.step(1.0))
        core.check_health()
    assert runtime.max_in_flight == 2
    journal.check(first)
    journal.check(second)


def test_a_long_prefill_is_neither_behind_a_decode_nor_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "LONGEST_AHEAD", 10)
    runtime = CLUSTER.runtime()
    core, journal = CLUSTER.core(runtime), Journal()
    first, short, long = [CLUSTER.request(*each) for each in (("first", 8, 30), ("short", 10, 20), ("long", 11, 10))]
    core.add(first)
    step_until(core, journal, lambda: kinds(runtime) == "pdccc")
    core.add(short)
    step_until(core, journal, lambda: kinds(runtime).endswith("pd"))
    assert awaited(runtime.submitted[-1]) == ["short"]
    step_until(core, journal, lambda: kinds(runtime).endswith("ccc"))
    core.add(long)
    step_until(core, journal, lambda: members(runtime.submitted[-1]) == ["long"])
    assert len(core._state.flights) == 1
    finish(core, journal, first, short, long)
    assert not any("long" in awaited(iteration) for iteration in runtime.submitted)


@pytest.mark.parametrize("num_instances", [1, 2])
def test_while_somebody_else_waits_what_follows_is_decided_when_it_is_due(num_instances: int) -> None:
    """Prompts of which a prefill holds two. Among several instances others may be idle by then, too."""
    cluster = dataclasses.replace(CLUSTER, num_instances=num_instances, num_pages=12, max_model_len=40)
    runtime = cluster.runtime()
    core, journal = cluster.core(runtime), Journal()
    requests = [cluster.request(f"r{i}", 30, 8) for i in range(6)]
    core.add(*requests)
    journal.write(core.step(0.0))
    assert len(core._state.waiting) > 0
    assert ("d" in kinds(runtime)) == (num_instances == 1)
    finish(core, journal, *requests)


@pytest.mark.parametrize("num_prompts", [1, 2])
def test_a_prompt_that_comes_is_behind_a_decode_of_several_instances_if_no_other_waits(num_prompts: int) -> None:
    """Of which a prefill on both holds one."""
    cluster = dataclasses.replace(CLUSTER, num_instances=2, max_model_len=128)
    runtime = cluster.runtime()
    eager = BatchingConfig(reserves_max_tokens=False, min_decodes=0)
    core, journal = cluster.core(runtime, StaticPolicy(cluster.shape, eager)), Journal()
    first, *others = [cluster.request(name, 80, 20) for name in ("first", "second", "third")[: 1 + num_prompts]]
    core.add(first)
    step_until(core, journal, lambda: kinds(runtime) == "pdccc")
    core.add(*others)
    step_until(core, journal, lambda: kinds(runtime).endswith("p"))
    assert members(runtime.submitted[-1]) == ["second"]
    assert len(core._state.flights) == (2 if num_prompts == 1 else 1)
    finish(core, journal, first, *others)


def test_what_a_policy_says_of_a_prefill_in_flight_is_not_kept() -> None:
    """Ten steps of decode before the next prefill: which this one does not know of, before it is over."""
    runtime = CLUSTER.runtime()
    core, journal = CLUSTER.core(runtime, StaticPolicy(CLUSTER.shape)), Journal()
    requests = [CLUSTER.request("first", 8, 20), CLUSTER.request("second", 30, 1), CLUSTER.request("third", 44, 20)]
    core.add(requests[0])
    for _ in range(3):
        journal.write(core.step(1.0))
    for request in requests[1:]:
        core.add(request)
        journal.write(core.step(0.0))
    finish(core, journal, *requests)
    # The first has ended when the third comes.
    assert kinds(runtime) == "pd" + 10 * "c" + "pd" + 7 * "c" + "pd" + 18 * "c"


def test_a_prefill_is_not_to_blame_for_the_decode_before_it() -> None:
    runtime = CLUSTER.runtime(fails=lambda iteration: iteration.iteration_id == 4)
    core, journal = CLUSTER.core(runtime), Journal()
    first, second = CLUSTER.request("first", 8, 20), CLUSTER.request("second", 8, 20)
    core.add(first)
    step_until(core, journal, lambda: kinds(runtime) == "pdccc")
    core.add(second)
    step_until(core, journal, lambda: kinds(runtime).endswith("pr"))
    assert kinds(runtime) == "pdcccpr"
    suspects = {live.request_id: live.num_failures for live in core._state.live.values()}
    assert suspects == {"first/0": 1, "second/0": 0}
    finish(core, journal, first, second)


def test_a_prompt_waits_where_there_are_pages_only_once_somebody_has_ended() -> None:
    """Twelve pages, of which the first holds seven when it gets its last token, and the second prompt needs six."""
    cluster = dataclasses.replace(CLUSTER, num_pages=12, max_model_len=48)
    runtime = cluster.runtime()
    core, journal = cluster.core(runtime), Journal()
    first, second = cluster.request("first", 20, 8), cluster.request("second", 24, 4)
    core.add(first, second)
    step_until(core, journal, lambda: kinds(runtime).count("p") == 2)
    assert "first/0" in journal.last, "its pages are free"
    finish(core, journal, first, second)


def test_behind_a_prefill_there_is_no_other() -> None:
    """They come one after the other, while prefills are in flight that take long."""
    runtime = CLUSTER.runtime(duration_s=lambda iteration: 5.0 if isinstance(iteration, PrefillIteration) else 1.0)
    core, journal = CLUSTER.core(runtime), Journal()
    requests = [CLUSTER.request(f"r{i}", 8, 8) for i in range(4)]
    for request in requests:
        core.add(request)
        journal.write(core.step(1.0))
        journal.write(core.step(1.0))
    finish(core, journal, *requests)
    assert "pp" not in kinds(runtime)
    assert runtime.max_in_flight == 2


def test_what_follows_a_prefill_is_asked_once_while_another_group_steps() -> None:
    """A prompt on two instances leaves its keys on one, so that no decode of its group can be behind it."""
    cluster = dataclasses.replace(CLUSTER, num_instances=3, prefill_tokens_per_instance=8)
    runtime = cluster.runtime(duration_s=lambda iteration: 30.0 if iteration.group.dop == 2 else 1.0)
    views: list[ClusterView] = []
    core, journal = cluster.core(runtime, Noting(cluster.policy(), views)), Journal()
    core.add(cluster.request("steps", 8, 50))
    step_until(core, journal, lambda: kinds(runtime).count("c") == 3)
    core.add(cluster.request("long", 16, 4))
    step_until(core, journal, lambda: kinds(runtime).count("c") == 20)
    assert [iteration.group.dop for iteration in runtime.submitted if isinstance(iteration, PrefillIteration)] == [1, 2]
    about_its_end = [
        view
        for view in views
        if "long/0" in [request.request_id for request in view.running]
        and not any(instance.is_prefilling for instance in view.instances)
    ]
    assert len(about_its_end) == 1
    run(core, journal)
    assert_nothing_leaks(core)


def chunked(cluster: Cluster, runtime: FakeRuntime, chunk_tokens: int) -> EngineCore:
    return cluster.core(runtime, ChunkedPolicy(cluster.shape, chunk_tokens))


def test_chunks_follow_each_other_and_decodes_without_a_pause() -> None:
    runtime = CLUSTER.runtime()
    core, journal = chunked(CLUSTER, runtime, 5), Journal()
    first, second = CLUSTER.request("first", 3, 20), CLUSTER.request("second", 13, 6)
    core.add(first)
    step_until(core, journal, lambda: kinds(runtime) == "edcc")
    core.add(second)
    finish(core, journal, first, second)
    # Beside the token of the first, four of the prompt at a time; its thirteenth is a decode's.
    assert kinds(runtime) == "edcc" + "eee" + "dcccccdcccccc"
    extends = [iteration for iteration in runtime.submitted[4:] if isinstance(iteration, ExtendIteration)]
    assert [[len(item.token_ids) for item in iteration.inputs] for iteration in extends] == [[1, 4]] * 3
    assert [awaited(iteration) for iteration in runtime.submitted[:8]] == [[], ["first"], [], [], *[["first"]] * 4]
    assert members(runtime.submitted[7]) == ["first", "second"]
    assert runtime.now_s() == len(runtime.submitted)


def test_nobody_is_asked_about_what_nothing_can_follow() -> None:
    """Extends with penalties, while others come: once for each iteration, as without running ahead."""
    runtime = CLUSTER.runtime()
    views: list[ClusterView] = []
    core = CLUSTER.core(runtime, Noting(ChunkedPolicy(CLUSTER.shape, 5), views))
    journal = Journal()
    requests = [CLUSTER.request(f"r{i}", 13, 8, frequency_penalty=0.5) for i in range(6)]
    for request in requests:
        core.add(request)
        journal.write(core.step(0.0))
    while kinds(runtime).count("e") < 6:
        journal.write(core.step(1.0))
    num_arrivals = len(requests) - 1
    assert len(views) <= len(runtime.submitted) + num_arrivals
    finish(core, journal, *requests)


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_a_chunk_waits_for_the_tokens_of_a_decode_that_the_host_has_to_count(penalty: float) -> None:
    runtime = CLUSTER.runtime()
    core, journal = chunked(CLUSTER, runtime, 5), Journal()
    first, second = CLUSTER.request("first", 3, 20, presence_penalty=penalty), CLUSTER.request("second", 13, 6)
    core.add(first)
    step_until(core, journal, lambda: kinds(runtime).endswith("ccc"))
    core.add(second)
    finish(core, journal, first, second)
    extends = [iteration for iteration in runtime.submitted if isinstance(iteration, ExtendIteration)]
    assert any("first" in awaited(iteration) for iteration in extends) == (not penalty)


@pytest.mark.parametrize("penalised", ["first", "second"])
def test_chunks_wait_for_tokens_that_the_host_has_to_count(penalised: str) -> None:
    runtime = CLUSTER.runtime()
    core, journal = chunked(CLUSTER, runtime, 5), Journal()
    requests = [
        CLUSTER.request(name, length, 8, frequency_penalty=0.5 if name == penalised else 0.0)
        for name, length in (("first", 3), ("second", 13))
    ]
    core.add(*requests)
    finish(core, journal, *requests)
    assert not any(penalised in awaited(iteration) for iteration in runtime.submitted)
    assert runtime.max_in_flight == 2


def test_a_chunk_waits_for_pages_that_somebody_is_about_to_leave() -> None:
    cluster = dataclasses.replace(CLUSTER, num_pages=8, max_model_len=32)
    runtime = cluster.runtime()
    core, journal = chunked(cluster, runtime, 6), Journal()
    requests = [cluster.request("ends", 12, 4), cluster.request("comes", 20, 8)]
    core.add(*requests)
    finish(core, journal, *requests)


@pytest.mark.parametrize("failing", range(9))
def test_a_chunk_that_fails_takes_what_is_behind_it_along(failing: int) -> None:
    runtime = CLUSTER.runtime(fails=lambda iteration: iteration.iteration_id == failing)
    core, journal = chunked(CLUSTER, runtime, 5), Journal()
    requests = [CLUSTER.request("first", 3, 12), CLUSTER.request("second", 13, 6)]
    core.add(*requests)
    finish(core, journal, *requests)
    assert kinds(runtime).count("r") == 1
    assert {journal.last[request.request_id].finish_reason for request in requests} == {FinishReason.LENGTH}
