"""An iteration that does not come back is noticed and told, and ends nothing."""

from __future__ import annotations

import math

import pytest

from loongjax.core.iteration import PrefillIteration
from loongjax.core.request import FinishReason
from loongjax.engine.core import EngineCore
from loongjax.errors import EngineDeadError
from tests.engine.cluster import Cluster, Journal, assert_nothing_leaks, run

CLUSTER = Cluster()


def core_with_slow_prefills(duration_s: float, cluster: Cluster = CLUSTER) -> EngineCore:
    """Prefills of 20 tokens or more, on two instances, take so long, everything else a second."""

    def duration(iteration: object) -> float:
        is_slow = isinstance(iteration, PrefillIteration) and len(iteration.inputs[0].token_ids) >= 20
        return duration_s if is_slow else 1.0

    return cluster.core(cluster.runtime(duration_s=duration))


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "loongjax.engine.watch"]


def test_an_engine_at_work_is_healthy() -> None:
    core = core_with_slow_prefills(599.0)
    core.add(CLUSTER.request("slow", 20), CLUSTER.request("fast", 4, 100))
    while not core.is_idle:
        core.check_health()
        core.step(10.0)
    core.check_health()


def test_an_iteration_that_never_ends_is_told_with_its_instances_and_its_time() -> None:
    core = core_with_slow_prefills(math.inf)
    core.add(CLUSTER.request("slow", 20))
    for _ in range(61):
        core.check_health()
        core.step(10.0)
    core.step(10.0)
    expected = r"instances \(0, 1\) have not answered for 61\d s: iteration 0 \(prefill\) .* iteration_timeout_s = 600"
    with pytest.raises(EngineDeadError, match=expected):
        core.check_health()
    assert core.death is None


def test_it_is_logged_once_whoever_asks(caplog: pytest.LogCaptureFixture) -> None:
    core = core_with_slow_prefills(math.inf)
    core.add(CLUSTER.request("slow", 20))
    for _ in range(100):
        core.step(10.0)
    for _ in range(3):
        with pytest.raises(EngineDeadError):
            core.check_health()
    (complaint,) = complaints(caplog)
    assert "instances (0, 1)" in complaint


def test_other_groups_go_on_beside_it() -> None:
    core = core_with_slow_prefills(math.inf)
    core.add(CLUSTER.request("slow", 20))
    core.step(1.0)
    others = [CLUSTER.request(f"r{i}", 4, 20) for i in range(4)]
    core.add(*others)
    journal = Journal()
    for _ in range(300):
        journal.write(core.step(10.0))
    for request in others:
        journal.check(request)
        assert journal.last[request.request_id].finish_reason is FinishReason.LENGTH
    with pytest.raises(EngineDeadError):
        core.check_health()


def test_an_iteration_that_comes_back_makes_the_engine_healthy_again(caplog: pytest.LogCaptureFixture) -> None:
    core = core_with_slow_prefills(1000.0)
    request = CLUSTER.request("slow", 20, 5)
    core.add(request, CLUSTER.request("fast", 4, 100))
    num_sick = 0
    journal = Journal()
    while not core.is_idle:
        journal.write(core.step(10.0))
        try:
            core.check_health()
        except EngineDeadError:
            num_sick += 1
    journal.check(request)
    assert num_sick > 30
    assert len(complaints(caplog)) == 2
    assert complaints(caplog)[-1] == "iteration 0 on instances (0, 1) ended after all, after 1000 s"
    core.check_health()
    assert_nothing_leaks(core)


def test_a_dead_engine_is_not_healthy() -> None:
    core = CLUSTER.core(CLUSTER.runtime(fails=lambda iteration: True))
    core.add(CLUSTER.request("a", 4))
    while core.death is None:
        core.step(1.0)
    with pytest.raises(EngineDeadError, match="fail even without a request"):
        core.check_health()


def test_without_a_limit_nothing_is_overdue() -> None:
    cluster = Cluster(iteration_timeout_s=math.inf)
    core = core_with_slow_prefills(5000.0, cluster)
    core.add(cluster.request("slow", 20))
    run(core)
    core.check_health()
