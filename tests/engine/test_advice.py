"""What is decided while devices work is not decided again when they are done, unless something has changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from loongjax.core.iteration import Completion, DecodeIteration, Iteration, PrefillIteration
from loongjax.core.plan import Plan
from loongjax.core.request import FinishReason
from loongjax.costmodel.work import Strategy
from loongjax.scheduler.esp.config import EspConfig
from loongjax.scheduler.esp.explain import Decision
from loongjax.scheduler.esp.policy import EspPolicy
from loongjax.scheduler.observation import Observation
from loongjax.scheduler.policy import Policy
from loongjax.scheduler.view import ClusterView
from tests.engine.cluster import Cluster, Journal, assert_nothing_leaks, run
from tests.engine.fake_runtime import FakeRuntime
from tests.scheduler.esp.hand_model import HandModel


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


TWO_INSTANCES = Cluster(num_instances=2, num_pages=64, max_model_len=64)
"""A prompt of 32 tokens takes both, so that it cannot be submitted behind a decode on one."""


def test_what_follows_a_decode_is_decided_while_it_runs() -> None:
    """A prompt comes while a decode and its successor are in flight: it starts as soon as they are over."""
    events: list[str] = []
    core = TWO_INSTANCES.core(TellingRuntime(TWO_INSTANCES, events), TellingPolicy(TWO_INSTANCES.policy(), events))
    requests = [TWO_INSTANCES.request(name, length, max_tokens=30) for name, length in (("first", 8), ("second", 32))]
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
    requests = [CLUSTER.request(name, 4, max_tokens) for name, max_tokens in (("a", 6), ("b", 6), ("long", 20))]
    journal = Journal()
    core.add(*requests)
    while "a/0" not in journal.last:
        events.clear()
        journal.write(core.step(1.0))
    # The last token of most, and at once the other one's next decode, which begins again, and the one behind that, of
    # which the policy is asked.
    assert journal.last["a/0"].finish_reason is journal.last["b/0"].finish_reason is FinishReason.LENGTH
    assert events == ["over", "decode", "asked", "decode"]
    run(core, journal)
    for request in requests:
        journal.check(request)
    assert_nothing_leaks(core)


@pytest.mark.parametrize("leaves", ["first/0", "second/0"])
def test_an_answer_is_not_followed_where_somebody_has_left_meanwhile(leaves: str) -> None:
    events: list[str] = []
    core = TWO_INSTANCES.core(TellingRuntime(TWO_INSTANCES, events), TellingPolicy(TWO_INSTANCES.policy(), events))
    requests = [TWO_INSTANCES.request(name, length, max_tokens=30) for name, length in (("first", 8), ("second", 32))]
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


def test_what_the_engine_acts_on_is_explained_once_and_apart_from_what_it_only_asks() -> None:
    """Prompts come while a decode and its successor are in flight, and some of the answers about them are followed."""
    decisions: list[Decision] = []
    runtime = CLUSTER.runtime()
    model = HandModel(token_s=0.1, step_s=1.0)
    core = CLUSTER.core(runtime, EspPolicy(EspConfig(growth_tokens=4), model, explain=decisions.append))
    requests = [CLUSTER.request(f"r{index}", 4, max_tokens=12) for index in range(5)]
    journal = Journal()
    for index, request in enumerate(requests):
        core.add(request)
        while len(runtime.submitted) < 5 * index:
            journal.write(core.step(1.0))
    run(core, journal)
    batches = [decision for decision in decisions if decision.step == "batch"]
    started = [decision.request_ids for decision in batches if not decision.is_rehearsal]
    prefilled = [
        tuple([item.request.request_id for item in iteration.inputs])
        for iteration in runtime.submitted
        if isinstance(iteration, PrefillIteration)
    ]
    assert started == prefilled
    rehearsed = [decision for decision in batches if decision.is_rehearsal]
    assert rehearsed
    followed = [decision for decision in batches if dataclasses.replace(decision, is_rehearsal=True) in rehearsed]
    assert any(not decision.is_rehearsal for decision in followed)


def test_how_far_predictions_are_off_is_in_the_statistics() -> None:
    """Everything takes a second, of which the policy expects twice as much for a decode, and half for this prompt."""
    runtime = CLUSTER.runtime()
    core = CLUSTER.core(runtime, EspPolicy(EspConfig(), HandModel(token_s=0.125, step_s=2.0)))
    assert core.stats().predicted_over_actual == {}
    core.add(CLUSTER.request("a", 4, max_tokens=60))
    run(core)
    num_steps = sum(isinstance(iteration, DecodeIteration) for iteration in runtime.submitted)
    # A tenth of the logarithm is learned each time, which leaves 0.9 of what was not.
    assert core.stats().predicted_over_actual == {
        ("prefill", Strategy(1)): pytest.approx(0.5**0.1),
        ("decode", Strategy(1)): pytest.approx(2.0 ** (1.0 - 0.9**num_steps)),
    }
    simple = CLUSTER.core()
    simple.add(CLUSTER.request("a", 4))
    run(simple)
    assert simple.stats().predicted_over_actual == {}
