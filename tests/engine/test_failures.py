"""Who is to blame for a failed iteration, and what becomes of the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest

from loongjax.core.cluster import Group
from loongjax.core.iteration import Iteration, MigrateIteration, PrefillIteration, RecoverIteration
from loongjax.core.plan import Migrate, Plan, Prefill, PrefillRequest, TokenInterval
from loongjax.core.request import FinishReason
from loongjax.engine.core import EngineCore
from loongjax.engine.failures import RECOVERY_TIMEOUT_S, blame
from loongjax.engine.live_request import LiveRequest
from loongjax.scheduler.observation import Observation
from loongjax.scheduler.policy import Policy
from loongjax.scheduler.view import ClusterView
from tests.engine.cluster import Cluster, Journal, assert_nothing_leaks, run
from tests.engine.fake_runtime import FakeRuntime

CLUSTER = Cluster()


def live(name: str) -> LiveRequest:
    return LiveRequest(CLUSTER.request(name, 8), 0, 0.0)


def prefill_of(prefix: str) -> Callable[[Iteration], bool]:
    """Whether an iteration prefills a request of such a name."""

    def is_one(iteration: Iteration) -> bool:
        return isinstance(iteration, PrefillIteration) and any(
            item.request.request_id.startswith(prefix) for item in iteration.inputs
        )

    return is_one


class Scripted:
    """A policy that plans what a script says, one plan at a time, and then what another one does."""

    def __init__(self, script: Sequence[Plan], then: Policy) -> None:
        self._script = list(script)
        self._then = then

    def observe(self, observations: Sequence[Observation]) -> None:
        pass

    def copy(self) -> Scripted:
        return Scripted(self._script, self._then.copy())

    def plan(self, view: ClusterView) -> tuple[Plan, ...]:
        return (self._script.pop(0),) if self._script else self._then.plan(view)


def recoveries(runtime: FakeRuntime) -> list[Group]:
    return [iteration.group for iteration in runtime.submitted if isinstance(iteration, RecoverIteration)]


def run_until_death(core: EngineCore) -> Journal:
    journal = Journal()
    while core.death is None:
        journal.write(core.step(1.0))
    return journal


def test_a_first_failure_is_nobodys_fault() -> None:
    assert blame([live("a"), live("b")]) == []


def test_a_request_that_fails_twice_is_to_blame() -> None:
    culprit = live("a")
    blame([culprit, live("b")])
    assert blame([culprit]) == [culprit]


def test_a_request_that_got_a_token_in_between_is_not() -> None:
    request = live("a")
    blame([request])
    request.num_failures = 0
    assert blame([request]) == []


@pytest.mark.parametrize("num_instances", [1, 3])
def test_requests_that_always_fail_end_alone_however_many_come_in_a_row(num_instances: int) -> None:
    cluster = Cluster(num_instances=num_instances, max_model_len=64)
    core = cluster.core(cluster.runtime(fails=prefill_of("poison")))
    journal = Journal()
    for i in range(6):
        core.add(cluster.request(f"poison{i}", 10 + i))
        run(core, journal)
    core.add(*[cluster.request(f"poison{i}", 10 + i) for i in range(6, 12)])
    run(core, journal)
    assert core.death is None
    for i in range(12):
        last = journal.last[f"poison{i}/0"]
        assert last.finish_reason is FinishReason.ERROR
        assert last.error == "2 iterations in a row with it failed: injected failure"
    healthy = cluster.request("healthy", 12)
    core.add(healthy)
    run(core, journal)
    journal.check(healthy)
    assert journal.last["healthy/0"].finish_reason is FinishReason.LENGTH
    assert_nothing_leaks(core)


def test_many_requests_that_always_fail_leave_those_between_them_their_tokens() -> None:
    core = CLUSTER.core(CLUSTER.runtime(fails=prefill_of("poison")))
    healthy = [CLUSTER.request(f"healthy{i}", 6, 20) for i in range(5)]
    for i, request in enumerate(healthy):
        core.add(CLUSTER.request(f"poison{2 * i}", 7), request, CLUSTER.request(f"poison{2 * i + 1}", 40))
    journal = run(core)
    assert core.death is None
    for request in healthy:
        journal.check(request)
        assert journal.last[request.request_id].finish_reason is FinishReason.LENGTH
    assert len(journal.last) == 15
    assert_nothing_leaks(core)


def test_a_failed_group_recovers_once_and_nobody_else_does() -> None:
    runtime = CLUSTER.runtime(fails=lambda iteration: iteration.iteration_id == 0)
    core = CLUSTER.core(runtime)
    core.add(*[CLUSTER.request(f"r{i}", 16, 30) for i in range(4)])
    run(core)
    assert recoveries(runtime) == [runtime.submitted[0].group]
    assert runtime.submitted[0].group != Group.of(CLUSTER.shape.all_instances)


def test_others_go_on_while_a_group_recovers() -> None:
    runtime = CLUSTER.runtime(
        fails=prefill_of("poison"),
        duration_s=lambda iteration: 110.0 if isinstance(iteration, RecoverIteration) else 1.0,
    )
    core = CLUSTER.core(runtime)
    healthy = CLUSTER.request("healthy", 4, 60)
    core.add(healthy)
    core.step(1.0)
    core.add(CLUSTER.request("poison", 10))
    journal = Journal()
    while "healthy/0" not in journal.last:
        journal.write(core.step(1.0))
    journal.check(healthy)
    assert recoveries(runtime)
    assert runtime.now_s() < 100.0
    assert core.death is None


def test_devices_that_fail_whatever_runs_on_them_end_the_engine_at_once() -> None:
    runtime = CLUSTER.runtime(fails=lambda iteration: True)
    core = CLUSTER.core(runtime)
    core.add(CLUSTER.request("a", 20))
    journal = run_until_death(core)
    core.close()
    assert runtime.waits_at_close
    assert len(runtime.submitted) <= 3
    assert core.death == "the devices of instances (0, 1) fail even without a request: injected failure"
    assert journal.last["a/0"].error == core.death
    assert_nothing_leaks(core)


def test_an_instance_that_fails_whatever_runs_on_it_ends_the_engine_while_others_work() -> None:
    core = CLUSTER.core(CLUSTER.runtime(fails=lambda iteration: 2 in iteration.group.instances))
    core.add(*[CLUSTER.request(f"r{i}", 8, 60) for i in range(12)])
    journal = run_until_death(core)
    assert core.death is not None
    assert "fail even without a request" in core.death
    assert journal.last.keys() == {f"r{i}/0" for i in range(12)}
    assert_nothing_leaks(core)


def test_devices_that_answer_nothing_after_a_failure_end_the_engine() -> None:
    cluster = Cluster(num_instances=1, max_model_len=64)
    runtime = cluster.runtime(
        fails=prefill_of("poison"),
        duration_s=lambda iteration: math.inf if isinstance(iteration, RecoverIteration) else 1.0,
    )
    core = cluster.core(runtime)
    core.add(cluster.request("poison", 4))
    journal = run_until_death(core)
    assert core.death == "the devices of instances (0,) did not answer within 120 s after a failure"
    assert journal.last["poison/0"].error == core.death
    assert RECOVERY_TIMEOUT_S < runtime.now_s() < RECOVERY_TIMEOUT_S + 5.0
    assert_nothing_leaks(core)
    core.close()
    assert runtime.is_closed
    assert not runtime.waits_at_close


@pytest.mark.parametrize("duration_s", [1.0, 30.0, 119.0])
def test_a_slow_recovery_is_waited_for(duration_s: float) -> None:
    runtime = CLUSTER.runtime(
        fails=lambda iteration: iteration.iteration_id == 3,
        duration_s=lambda iteration: duration_s if isinstance(iteration, RecoverIteration) else 1.0,
    )
    core = CLUSTER.core(runtime)
    request = CLUSTER.request("a", 8, 20)
    core.add(request)
    run(core).check(request)
    assert core.death is None


def test_requests_may_be_aborted_and_arrive_while_all_devices_recover() -> None:
    cluster = Cluster(num_instances=1, max_model_len=64)
    core = cluster.core(cluster.runtime(fails=lambda iteration: iteration.iteration_id == 2))
    early, late = cluster.request("early", 8, 20), cluster.request("late", 8, 20)
    core.add(early)
    journal = Journal()
    runtime = core._runtime
    assert isinstance(runtime, FakeRuntime)
    while not recoveries(runtime):
        journal.write(core.step(1.0))
    core.abort("early/0")
    core.add(late)
    run(core, journal)
    assert journal.last["early/0"].finish_reason is FinishReason.ABORT
    journal.check(late)
    assert_nothing_leaks(core)


@pytest.mark.parametrize("migration_s", [0.5, 3.0, 5.0, 50.0])
@pytest.mark.parametrize("migration_fails", [False, True])
def test_a_request_may_lose_keys_on_one_instance_while_others_migrate(
    migration_s: float, migration_fails: bool
) -> None:
    runtime = CLUSTER.runtime(
        duration_s=lambda iteration: migration_s if isinstance(iteration, MigrateIteration) else 1.0,
        fails=lambda iteration: (
            iteration.iteration_id == 2 or (migration_fails and isinstance(iteration, MigrateIteration))
        ),
    )
    moved, other = CLUSTER.request("moved", 12, 20), CLUSTER.request("other", 4, 20)
    spread = tuple(TokenInterval(instance, 4 * instance, 4 * instance + 4) for instance in range(3))
    script = (
        Prefill(Group((0, 1, 2)), (PrefillRequest("moved/0", spread),)),
        Migrate("moved/0", 1, 0, 4),
        Prefill(Group((2,)), (PrefillRequest("other/0", (TokenInterval(2, 0, 4),)),)),
    )
    core = CLUSTER.core(runtime, Scripted(script, CLUSTER.policy()))
    journal = Journal()
    core.add(moved)
    while len(runtime.submitted) < 2:
        journal.write(core.step(1.0))
    core.add(other)
    run(core, journal)
    for request in (moved, other):
        journal.check(request)
        assert journal.last[request.request_id].finish_reason is FinishReason.LENGTH
    assert recoveries(runtime).count(Group((0, 1))) == migration_fails
    assert_nothing_leaks(core)
