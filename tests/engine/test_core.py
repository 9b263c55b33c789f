"""The engine's loop over a fake runtime: requests end once, with the right tokens, and leave nothing behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest

from loongjax.core.iteration import DecodeIteration, Iteration, PrefillIteration
from loongjax.core.request import FinishReason
from loongjax.errors import ConfigError, ContextLengthError, EngineDeadError, QueueFullError, RequestError
from loongjax.kvcache.kv_cache import KVCache
from loongjax.scheduler.observation import Observation
from tests.engine.cluster import Cluster, Journal, assert_nothing_leaks, run
from tests.engine.fake_runtime import FakeRuntime, expected_tokens

CLUSTER = Cluster()


def decodes(runtime: FakeRuntime) -> list[DecodeIteration]:
    return [iteration for iteration in runtime.submitted if isinstance(iteration, DecodeIteration)]


def prefills(runtime: FakeRuntime) -> list[PrefillIteration]:
    return [iteration for iteration in runtime.submitted if isinstance(iteration, PrefillIteration)]


class FailsOn:
    """Fails the iterations whose place in the order of submission is listed."""

    def __init__(self, *places: int) -> None:
        self._places = set(places)
        self._num_seen = -1

    def __call__(self, iteration: Iteration) -> bool:
        self._num_seen += 1
        return self._num_seen in self._places


@pytest.mark.parametrize("run_ahead", [False, True])
def test_a_lone_request_gets_the_tokens_of_the_model(run_ahead: bool) -> None:
    core = dataclasses.replace(CLUSTER, run_ahead=run_ahead).core()
    request = CLUSTER.request("a", 30, 12)
    core.add(request)
    run(core).check(request)
    assert_nothing_leaks(core)


def test_requests_of_every_size_run_together_and_end_once() -> None:
    core = CLUSTER.core()
    requests = [CLUSTER.request(f"r{i}", 1 + 7 * i % 90, 1 + i % 17, ignore_eos=i % 2 == 0) for i in range(40)]
    core.add(*requests)
    journal = run(core)
    for request in requests:
        journal.check(request)
    assert_nothing_leaks(core)


def test_fifty_requests_that_need_five_times_the_pool_all_finish() -> None:
    cluster = dataclasses.replace(CLUSTER, num_pages=12)
    requests = [cluster.request(f"r{i}", 4 + i % 9, 4 + i % 23) for i in range(50)]
    num_tokens = sum(len(request.prompt_token_ids) + request.max_tokens for request in requests)
    assert num_tokens >= 5 * cluster.num_instances * cluster.num_pages * cluster.page_size
    core = cluster.core()
    core.add(*requests)
    journal = run(core)
    for request in requests:
        journal.check(request)
    assert_nothing_leaks(core)


def test_a_steady_decode_is_submitted_ahead_of_its_tokens() -> None:
    runtime = CLUSTER.runtime()
    core = CLUSTER.core(runtime)
    core.add(CLUSTER.request("a", 8, 20))
    run(core)
    steady = [iteration for iteration in decodes(runtime) if iteration.continues]
    assert len(decodes(runtime)) == 19
    assert len(steady) == 18
    inputs = [iteration.sub_batches[0].inputs[0] for iteration in steady]
    assert all(item.output_token_ids == () for item in inputs), "the devices hold them"
    assert [item.position for item in inputs] == list(range(9, 27))
    assert runtime.max_in_flight == 2


def test_without_run_ahead_one_iteration_is_in_flight() -> None:
    runtime = CLUSTER.runtime()
    core = dataclasses.replace(CLUSTER, run_ahead=False).core(runtime)
    core.add(CLUSTER.request("a", 8, 20))
    run(core)
    assert runtime.max_in_flight == 1


def test_no_iteration_is_submitted_that_no_request_needs() -> None:
    runtime = CLUSTER.runtime()
    core = CLUSTER.core(runtime)
    core.add(CLUSTER.request("a", 8, 5))
    run(core)
    assert len(runtime.submitted) == 1 + 4


def test_a_request_that_stops_ignores_the_token_that_was_computed_ahead() -> None:
    request = next(
        request
        for request in (CLUSTER.request(f"r{i}", 8, 60, ignore_eos=False) for i in range(100))
        if 5 < len(expected_tokens(request)) < 60
    )
    runtime = CLUSTER.runtime()
    core = CLUSTER.core(runtime)
    core.add(request)
    journal = run(core)
    journal.check(request)
    assert len(decodes(runtime)) == len(expected_tokens(request)), "one more than were needed"
    assert journal.last[request.request_id].finish_reason is FinishReason.STOP
    assert_nothing_leaks(core)


def test_a_group_does_not_wait_for_another_ones_long_prefill() -> None:
    def duration_s(iteration: Iteration) -> float:
        return 1000.0 if isinstance(iteration, PrefillIteration) and iteration.group.dop > 1 else 1.0

    runtime = CLUSTER.runtime(duration_s=duration_s)
    core = CLUSTER.core(runtime)
    short, long = CLUSTER.request("short", 4, 40), CLUSTER.request("long", 40, 2)
    core.add(short)
    journal = Journal()
    for _ in range(3):
        journal.write(core.step(1.0))
    core.add(long)
    while "short/0" not in journal.last:
        journal.write(core.step(1.0))
    assert "long/0" not in journal.tokens
    assert runtime.now_s() < 100.0
    run(core, journal)
    journal.check(short)
    journal.check(long)


def test_a_request_is_admitted_while_another_group_computes() -> None:
    def duration_s(iteration: Iteration) -> float:
        return 1000.0 if isinstance(iteration, PrefillIteration) and iteration.group.dop > 1 else 1.0

    runtime = CLUSTER.runtime(duration_s=duration_s)
    core = CLUSTER.core(runtime)
    core.add(CLUSTER.request("long", 40, 2))
    journal = Journal()
    journal.write(core.step(0.0))
    core.add(CLUSTER.request("short", 4, 10))
    while "short/0" not in journal.last:
        journal.write(core.step(1.0))
    assert "long/0" not in journal.tokens
    run(core, journal)


def test_a_prompt_alone_ends_with_its_logprobs_and_no_tokens() -> None:
    core = CLUSTER.core()
    request = CLUSTER.request("a", 30, 0, prompt_logprobs=0)
    core.add(request)
    (event,) = [event for _ in range(3) for event in core.step(1.0)]
    assert event.token_ids == ()
    assert event.finish_reason is FinishReason.LENGTH
    assert event.prompt_logprobs is not None
    assert [item.token_id for item in event.prompt_logprobs] == list(request.prompt_token_ids[1:])
    assert_nothing_leaks(core)


def test_logprobs_come_with_the_tokens_they_belong_to() -> None:
    core = CLUSTER.core()
    core.add(CLUSTER.request("a", 5, 6, logprobs=0), CLUSTER.request("b", 5, 6))
    events = []
    while not core.is_idle:
        events += core.step(1.0)
    for event in events:
        expected = event.token_ids if event.request_id == "a/0" else ()
        assert tuple(item.token_id for item in event.logprobs) == expected


def test_aborting_a_waiting_request_ends_it_at_once() -> None:
    core = CLUSTER.core()
    core.add(CLUSTER.request("a", 8))
    core.abort("a/0")
    (event,) = core.step(1.0)
    assert event.finish_reason is FinishReason.ABORT
    assert core.is_idle
    assert_nothing_leaks(core)


@pytest.mark.parametrize("num_steps", range(1, 8))
def test_aborting_in_flight_frees_the_pages_before_the_iteration_ends(num_steps: int) -> None:
    core = CLUSTER.core()
    core.add(CLUSTER.request("a", 40, 20))
    journal = Journal()
    for _ in range(num_steps):
        journal.write(core.step(1.0))
    core.abort("a/0")
    assert set(core.stats().kv_slots_used) == {0}
    run(core, journal)
    assert journal.last["a/0"].finish_reason is FinishReason.ABORT
    assert_nothing_leaks(core)


def test_aborting_one_of_a_batch_leaves_the_others_their_tokens() -> None:
    core = CLUSTER.core()
    requests = [CLUSTER.request(f"r{i}", 5, 30) for i in range(6)]
    core.add(*requests)
    journal = Journal()
    for i in range(6):
        for _ in range(3):
            journal.write(core.step(1.0))
        if i % 2:
            core.abort(f"r{i}/0")
    run(core, journal)
    for request in requests:
        journal.check(request)
    assert_nothing_leaks(core)


def test_aborting_a_request_that_is_not_there_is_passed_over() -> None:
    core = CLUSTER.core()
    core.abort("nobody")
    assert core.step(0.0) == []


def test_an_id_can_be_used_again_while_the_dead_request_is_still_in_flight() -> None:
    core = CLUSTER.core()
    first, second = CLUSTER.request("a", 20, 10), CLUSTER.request("a", 20, 10)
    core.add(first)
    for _ in range(3):
        core.step(1.0)
    core.abort("a/0")
    (event,) = core.step(0.0)
    assert event.finish_reason is FinishReason.ABORT
    core.add(second)
    run(core).check(second)
    assert_nothing_leaks(core)


def test_preemption_changes_no_token_and_computes_prompt_logprobs_once() -> None:
    cluster = Cluster(num_instances=1, num_pages=16, page_size=4, max_model_len=64)
    runtime = cluster.runtime()
    core = cluster.core(runtime)
    requests = [cluster.request(f"r{i}", 12, 30, prompt_logprobs=0, logprobs=0) for i in range(4)]
    core.add(*requests)
    journal = run(core)
    assert core.stats().num_preemptions > 0
    for request in requests:
        journal.check(request)
    assert journal.prompt_logprobs == {request.request_id: 1 for request in requests}
    again = [item for prefill in prefills(runtime) for item in prefill.inputs if len(item.token_ids) > 12]
    assert again
    assert not any(item.wants_prompt_logprobs for item in again)


def test_a_preempted_request_goes_before_those_that_came_after_it() -> None:
    cluster = Cluster(num_instances=1, num_pages=16, page_size=4, max_model_len=64)
    core = cluster.core()
    requests = [cluster.request(f"r{i}", 12, 30) for i in range(8)]
    core.add(*requests)
    journal = run(core)
    assert next(iter(journal.last)) == "r0/0"
    assert core.stats().num_prompt_tokens == 8 * 12


@pytest.mark.parametrize("place", range(12))
def test_after_a_failed_iteration_everything_lost_is_recomputed(place: int) -> None:
    core = CLUSTER.core(CLUSTER.runtime(fails=FailsOn(place)))
    requests = [CLUSTER.request(f"r{i}", 3 + 9 * i, 9, prompt_logprobs=0) for i in range(5)]
    core.add(*requests)
    journal = run(core)
    for request in requests:
        journal.check(request)
        assert journal.last[request.request_id].finish_reason is FinishReason.LENGTH
    assert_nothing_leaks(core)


def test_failures_in_a_row_end_every_request_and_the_engine() -> None:
    runtime = CLUSTER.runtime(fails=FailsOn(*range(5, 100)))
    core = CLUSTER.core(runtime)
    requests = [CLUSTER.request(f"r{i}", 3 + i, 20) for i in range(5)]
    core.add(*requests)
    journal = Journal()
    while core.death is None:
        journal.write(core.step(1.0))
    assert {event.finish_reason for event in journal.last.values()} == {FinishReason.ERROR}
    assert {event.error for event in journal.last.values()} == {core.death}
    assert len(journal.last) == 5
    assert "injected failure" in core.death
    assert_nothing_leaks(core)
    with pytest.raises(EngineDeadError, match="injected failure"):
        core.add(CLUSTER.request("late", 3))
    with pytest.raises(EngineDeadError, match="injected failure"):
        core.step(0.0)


def test_two_failures_with_successes_of_all_between_kill_nobody() -> None:
    core = CLUSTER.core(CLUSTER.runtime(fails=FailsOn(3, 30)))
    requests = [CLUSTER.request(f"r{i}", 10, 40) for i in range(2)]
    core.add(*requests)
    journal = run(core)
    for request in requests:
        journal.check(request)


def prefill_of_fails(*names: str) -> Callable[[Iteration], bool]:
    """Fails every prefill that one of these takes part in."""

    def fails(iteration: Iteration) -> bool:
        return isinstance(iteration, PrefillIteration) and any(
            item.request.request_id in names for item in iteration.inputs
        )

    return fails


def test_a_request_that_always_fails_ends_alone_with_an_error() -> None:
    core = CLUSTER.core(CLUSTER.runtime(fails=prefill_of_fails("poison/0")))
    healthy = [CLUSTER.request(f"r{i}", 4, 100) for i in range(2)]
    core.add(*healthy)
    journal = Journal()
    for _ in range(10):
        journal.write(core.step(1.0))
    core.add(CLUSTER.request("poison", 60, 4))
    run(core, journal)
    assert core.death is None
    assert journal.last["poison/0"].finish_reason is FinishReason.ERROR
    for request in healthy:
        journal.check(request)
        assert journal.last[request.request_id].finish_reason is FinishReason.LENGTH
    assert_nothing_leaks(core)


@pytest.mark.parametrize("num_instances", [1, 2, 4])
@pytest.mark.parametrize("place", range(5))
def test_batch_mates_are_not_blamed_for_a_request_that_always_fails(num_instances: int, place: int) -> None:
    cluster = Cluster(num_instances=num_instances, prefill_tokens_per_instance=64, max_model_len=64)
    core = cluster.core(cluster.runtime(fails=prefill_of_fails(f"r{place}/0")))
    requests = [CLUSTER.request(f"r{i}", 4, 9) for i in range(5)]
    core.add(*requests)
    journal = run(core)
    assert core.death is None
    for i, request in enumerate(requests):
        journal.check(request)
        reason = FinishReason.ERROR if i == place else FinishReason.LENGTH
        assert journal.last[request.request_id].finish_reason is reason
    assert_nothing_leaks(core)


def test_an_engine_outlives_a_request_that_always_fails_with_nothing_beside_it() -> None:
    core = CLUSTER.core(CLUSTER.runtime(fails=prefill_of_fails("poison/0")))
    core.add(CLUSTER.request("poison", 20))
    last = run(core).last["poison/0"]
    assert core.death is None
    assert last.finish_reason is FinishReason.ERROR
    assert last.error is not None
    assert "injected failure" in last.error
    healthy = CLUSTER.request("healthy", 20)
    core.add(healthy)
    journal = run(core)
    journal.check(healthy)
    assert journal.last["healthy/0"].finish_reason is FinishReason.LENGTH


def test_a_lost_page_is_told_when_idle_and_costs_nobody_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    core = dataclasses.replace(CLUSTER, checks=False).core()
    core._state.kv_cache._pools[1].allocate(3)
    request = CLUSTER.request("a", 20)
    core.add(request)
    run(core).check(request)
    assert core.death is None
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "{0: 0, 1: 3, 2: 0, 3: 0}" in record.getMessage()


def test_an_engine_in_service_never_looks_at_every_page(monkeypatch: pytest.MonkeyPatch) -> None:
    def looks(cache: KVCache) -> None:
        raise AssertionError("every page was looked at")

    monkeypatch.setattr(KVCache, "check_integrity", looks)
    core = dataclasses.replace(CLUSTER, checks=False).core()
    request = CLUSTER.request("a", 20)
    core.add(request)
    run(core).check(request)


def test_a_policy_that_plans_nothing_is_found_out() -> None:
    class Idle:
        def observe(self, observations: Sequence[Observation]) -> None:
            pass

        def copy(self) -> Idle:
            return self

        def plan(self, view: object) -> tuple[()]:
            return ()

    core = CLUSTER.core(policy=Idle())
    core.add(CLUSTER.request("a", 3))
    with pytest.raises(Exception, match="the policy plans nothing"):
        core.step(0.0)
    assert core.death is not None


def test_the_history_names_the_groups_of_every_phase() -> None:
    core = CLUSTER.core()
    core.add(CLUSTER.request("a", 60, 10))
    history = run(core).last["a/0"].history
    assert [phase.kind for phase in history] == ["prefill", "decode"]
    assert (history[0].num_tokens, history[1].num_tokens) == (60, 9)
    assert history[0].dop == 4
    assert history[1].dop == 1
    assert history[0].masters == history[1].instances == history[1].masters


def test_the_statistics_add_up() -> None:
    runtime = CLUSTER.runtime()
    core = CLUSTER.core(runtime)
    core.add(CLUSTER.request("a", 60, 10), CLUSTER.request("b", 4, 3))
    run(core)
    stats = core.stats()
    assert sum(stats.prefill_dop.values()) == len(prefills(runtime))
    assert sum(stats.decode_dop.values()) == len(decodes(runtime))
    assert stats.num_iterations == len(runtime.submitted)
    assert stats.prefill_dop[4] == 1
    assert stats.num_scale_downs >= 1
    assert stats.num_prompt_tokens == 64
    assert stats.num_generation_tokens == 13
    assert stats.kv_slots == (128,) * 4


def test_a_request_that_outgrows_its_instance_scales_up() -> None:
    cluster = Cluster(num_instances=2, num_pages=8, page_size=4, max_model_len=60)
    core = cluster.core()
    request = cluster.request("a", 20, 40)
    core.add(request)
    journal = run(core)
    journal.check(request)
    assert core.stats().num_scale_ups == 1
    assert [phase.dop for phase in journal.last["a/0"].history if phase.kind == "decode"] == [1, 2]


def test_the_queue_limit_refuses_all_of_a_call_or_none() -> None:
    cluster = dataclasses.replace(CLUSTER, max_queue_len=3)
    core = cluster.core()
    core.add(cluster.request("a", 3), cluster.request("b", 3))
    with pytest.raises(QueueFullError) as caught:
        core.add(cluster.request("c", 3), cluster.request("d", 3))
    assert caught.value.retry_after_s > 0
    assert core.num_live == 2
    core.add(cluster.request("c", 3))
    assert not core.has_queue_place
    core.step(0.0)
    core.add(cluster.request("d", 3), cluster.request("e", 3))
    assert len(run(core).last) == 5


def test_more_samples_than_the_queue_ever_holds_are_malformed() -> None:
    cluster = dataclasses.replace(CLUSTER, max_queue_len=1)
    with pytest.raises(RequestError, match="at most 1"):
        cluster.core().add(cluster.request("a", 3), cluster.request("b", 3))


def test_an_id_in_use_is_refused() -> None:
    core = CLUSTER.core()
    core.add(CLUSTER.request("a", 3))
    with pytest.raises(RequestError, match="in use"):
        core.add(CLUSTER.request("a", 3))


def test_a_request_beyond_the_context_is_refused() -> None:
    core = CLUSTER.core()
    request = dataclasses.replace(CLUSTER.request("a", 100, 8), max_tokens=29)
    with pytest.raises(ContextLengthError, match="maximum context length"):
        core.add(request)


def test_a_request_of_the_whole_context_runs() -> None:
    cluster = Cluster(num_instances=3, num_pages=4, page_size=4, max_model_len=49, max_num_batched_tokens=17)
    core = cluster.core()
    requests = [cluster.request(f"r{i}", 1 + 12 * i, 48 - 12 * i) for i in range(5)]
    core.add(*requests)
    journal = run(core)
    for request in requests:
        journal.check(request)


@pytest.mark.parametrize("change", [{"max_model_len": 50}, {"max_num_batched_tokens": 16}])
def test_a_context_that_the_instances_cannot_hold_is_a_configuration_error(change: dict[str, int]) -> None:
    cluster = Cluster(num_instances=3, num_pages=4, page_size=4, max_model_len=49, max_num_batched_tokens=17)
    with pytest.raises(ConfigError, match="lower --max-model-len"):
        dataclasses.replace(cluster, **change).core()


def test_closing_closes_the_runtime() -> None:
    runtime = CLUSTER.runtime()
    core = CLUSTER.core(runtime)
    core.close()
    assert runtime.is_closed
    with pytest.raises(EngineDeadError):
        core.step(0.0)
