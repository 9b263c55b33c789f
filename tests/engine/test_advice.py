"""What is decided while devices work is not decided again when they are done, unless something has changed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from loongjax.core.iteration import Completion, Iteration, PrefillIteration
from loongjax.core.plan import Plan
from loongjax.core.request import FinishReason
from loongjax.scheduler.observation import Observation
from loongjax.scheduler.policy import Policy
from loongjax.scheduler.view import ClusterView
from tests.engine.cluster import Cluster, Journal, assert_nothing_leaks, run
from tests.engine.fake_runtime import FakeRuntime


class TellingPolicy:
    """Says when it is asked; its copies say so too."""

    def __init__(self, policy: Policy, events: list[str]) -> None:
        self._policy = policy
        self._events = events

    def plan(self, view: ClusterView) -> tuple[Plan, ...]:
        self._events.append("asked")
        return self._policy.plan(view)

    def observe(self, observations: Sequence[Observation]) -> None:
        self._policy.observe(observations)

    def copy(self) -> TellingPolicy:
        return TellingPolicy(self._policy.copy(), self._events)


class TellingRuntime(FakeRuntime):
    """Says what is submitted, and that something has completed."""

    def __init__(self, cluster: Cluster, events: list[str]) -> None:
        runtime = cluster.runtime()
        super().__init__(runtime.shape, runtime.limits)
        self._events = events

    def submit(self, iteration: Iteration) -> None:
        self._events.append("prefill" if isinstance(iteration, PrefillIteration) else "decode")
        super().submit(iteration)

    def completions(self, timeout_s: float | None) -> list[Completion]:
        completions = super().completions(timeout_s)
        self._events.extend(["over"] * len(completions))
        return completions


CLUSTER = Cluster(num_instances=1, num_pages=64, max_model_len=64)


def test_what_follows_a_decode_is_decided_while_it_runs() -> None:
    """A prompt comes while a decode and its successor are in flight: it starts as soon as they are over."""
    events: list[str] = []
    core = CLUSTER.core(TellingRuntime(CLUSTER, events), TellingPolicy(CLUSTER.policy(), events))
    requests = [CLUSTER.request(name, 8, max_tokens=40) for name in ("first", "second")]
    journal = Journal()
    core.add(requests[0])
    while events.count("decode") < 4:
        journal.write(core.step(1.0))
    core.add(requests[1])
    events.clear()
    while "prefill" not in events:
        journal.write(core.step(1.0))
    assert events[events.index("prefill") - 1] == "over"
    assert "asked" in events
    run(core, journal)
    for request in requests:
        journal.check(request)
    assert_nothing_leaks(core)


def test_what_follows_the_last_token_of_somebody_is_decided_before_it_is_there() -> None:
    events: list[str] = []
    core = CLUSTER.core(TellingRuntime(CLUSTER, events), TellingPolicy(CLUSTER.policy(), events))
    requests = [CLUSTER.request("short", 8, max_tokens=6), CLUSTER.request("long", 20, max_tokens=20)]
    journal = Journal()
    for request in requests:
        core.add(request)
    while "short/0" not in journal.last or journal.last["short/0"].finish_reason is None:
        events.clear()
        journal.write(core.step(1.0))
    # Its last token, and at once the other one's next decode, and the one behind that, of which the policy is asked.
    assert journal.last["short/0"].finish_reason is FinishReason.LENGTH
    assert events == ["over", "decode", "asked", "decode"]
    run(core, journal)
    for request in requests:
        journal.check(request)
    assert_nothing_leaks(core)


@pytest.mark.parametrize("leaves", ["first/0", "second/0"])
def test_an_answer_is_not_followed_where_somebody_has_left_meanwhile(leaves: str) -> None:
    events: list[str] = []
    core = CLUSTER.core(TellingRuntime(CLUSTER, events), TellingPolicy(CLUSTER.policy(), events))
    requests = [CLUSTER.request(name, 8, max_tokens=40) for name in ("first", "second")]
    journal = Journal()
    core.add(requests[0])
    while events.count("decode") < 4:
        journal.write(core.step(1.0))
    core.add(requests[1])
    events.clear()
    while events.count("over") < 1:
        journal.write(core.step(1.0))
    assert "prefill" not in events, "one decode is still in flight"
    core.abort(leaves)
    run(core, journal)
    assert journal.last[leaves].finish_reason is FinishReason.ABORT
    assert ("prefill" in events) == (leaves == "first/0")
    for request in requests:
        journal.check(request)
    assert_nothing_leaks(core)
