"""What a policy is told: every iteration that succeeded with its work and time, and every request's end."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from loongjax.core.iteration import Iteration, PrefillIteration
from loongjax.core.plan import Decode, Plan, Prefill
from loongjax.core.request import FinishReason, ServiceLevel
from loongjax.costmodel.work import DecodeWork, PrefillWork, Strategy
from loongjax.errors import RequestError
from loongjax.scheduler.observation import IterationEnded, Observation, RequestEnded
from loongjax.scheduler.simple import SimplePolicy
from loongjax.scheduler.view import ClusterView
from tests.engine.cluster import Cluster, run

CLUSTER = Cluster(num_instances=1, max_model_len=64)


class Listener(SimplePolicy):
    """Keeps all that it is told and shown."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Observation] = []
        self.seen: list[ClusterView] = []

    def observe(self, observations: Sequence[Observation]) -> None:
        self.heard.extend(observations)

    def plan(self, view: ClusterView) -> tuple[Plan, ...]:
        self.seen.append(view)
        return super().plan(view)


def duration_s(iteration: Iteration) -> float:
    return 10.0 if isinstance(iteration, PrefillIteration) else 1.0


@pytest.mark.parametrize("run_ahead", [False, True])
def test_an_iteration_is_told_with_its_work_and_without_its_wait_behind_another(run_ahead: bool) -> None:
    policy = Listener()
    core = Cluster(num_instances=1, max_model_len=64, run_ahead=run_ahead).core(
        CLUSTER.runtime(duration_s=duration_s), policy
    )
    core.add(CLUSTER.request("a", 8, 4))
    run(core)
    # The last step ended the request, and nobody asked the policy again but to tell it that.
    iterations = [heard for heard in policy.heard if isinstance(heard, IterationEnded)]
    assert [(heard.work, heard.elapsed_s) for heard in iterations] == [
        (PrefillWork(new_lens=(8,)), 10.0),
        (DecodeWork(rows=(1,), keys=(9,)), 1.0),
        (DecodeWork(rows=(1,), keys=(10,)), 1.0),
        (DecodeWork(rows=(1,), keys=(11,)), 1.0),
    ]
    assert {heard.strategy for heard in iterations} == {Strategy(1, 1)}
    assert [type(heard.plan) for heard in iterations] == [Prefill, Decode, Decode, Decode]


def test_an_iteration_that_failed_is_not_told() -> None:
    seen: list[Iteration] = []

    def fails(iteration: Iteration) -> bool:
        seen.append(iteration)
        return len(seen) == 1

    policy = Listener()
    core = CLUSTER.core(CLUSTER.runtime(duration_s=duration_s, fails=fails), policy)
    core.add(CLUSTER.request("a", 8, 1))
    run(core)
    assert [type(heard) for heard in policy.heard] == [IterationEnded, RequestEnded]


def test_every_end_of_a_request_is_told() -> None:
    policy = Listener()
    core = CLUSTER.core(policy=policy)
    core.add(CLUSTER.request("a", 8, 3), CLUSTER.request("b", 5, 3))
    core.abort("b/0")
    run(core)
    ends = [heard for heard in policy.heard if isinstance(heard, RequestEnded)]
    assert ends == [
        RequestEnded(num_prompt_tokens=5, num_output_tokens=0, finish_reason=FinishReason.ABORT),
        RequestEnded(num_prompt_tokens=8, num_output_tokens=3, finish_reason=FinishReason.LENGTH),
    ]


def test_a_view_tells_when_requests_came_and_how_far_they_are() -> None:
    policy = Listener()
    core = Cluster(num_instances=1, max_model_len=64, run_ahead=False).core(
        CLUSTER.runtime(duration_s=duration_s), policy
    )
    core.add(CLUSTER.request("a", 8, 3))
    run(core)
    (waiting,) = policy.seen[0].waiting
    assert (waiting.num_output_tokens, waiting.arrival_s) == (0, 0.0)
    decoded = [view.running[0] for view in policy.seen[1:]]
    assert [(request.num_output_tokens, request.first_token_s) for request in decoded] == [(1, 10.0), (2, 10.0)]
    assert [view.now_s for view in policy.seen] == [0.0, 10.0, 11.0]


def test_a_view_tells_what_every_busy_group_does_and_since_when() -> None:
    policy = Listener()
    cluster = Cluster(num_instances=2, run_ahead=False)
    core = cluster.core(cluster.runtime(duration_s=duration_s), policy)
    core.add(cluster.request("a", 8, 3))
    core.step(0.0)
    core.add(cluster.request("b", 6, 3))
    core.step(0.0)
    (flight,) = policy.seen[-1].flights
    assert (flight.work, flight.started_s) == (PrefillWork(new_lens=(8,)), 0.0)
    assert isinstance(flight.plan, Prefill)
    assert flight.group == flight.plan.group


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
def test_a_service_level_is_a_time(bad: float) -> None:
    with pytest.raises(RequestError, match="ttft_s"):
        ServiceLevel(ttft_s=bad)
    with pytest.raises(RequestError, match="tpot_s"):
        ServiceLevel(tpot_s=bad)
