"""What holds of any policy under random clusters, requests, completion orders and aborts.

A test draws clusters, makes engines of its policy on them, says what requests are added, and calls the checks below.
"""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Callable, Sequence

from hypothesis import strategies as st

from loongjax.core.cluster import ClusterShape
from loongjax.core.plan import Decode, Plan, Preempt, Prefill
from loongjax.scheduler.policy import Policy
from loongjax.scheduler.view import ClusterView
from tests.scheduler.toy_engine import Job, ToyEngine

AddRequest = Callable[[ToyEngine, random.Random], Job]
"""Adds a random request to an engine."""


@dataclasses.dataclass(frozen=True)
class RandomCluster:
    """A cluster, and what one iteration on it can hold."""

    shape: ClusterShape
    max_num_batched_tokens: int
    max_num_seqs: int

    def engine(self, policy: Policy) -> ToyEngine:
        return ToyEngine(
            policy, self.shape, max_num_batched_tokens=self.max_num_batched_tokens, max_num_seqs=self.max_num_seqs
        )


@st.composite
def clusters(
    draw: st.DrawFn,
    *,
    least_instances: int = 1,
    most_instances: int = 5,
    least_slots: int = 1,
    large_pools: bool = False,
) -> RandomCluster:
    """Pools from one longest request in the whole cluster upwards; with `large_pools`, far larger ones among them."""
    page_size = draw(st.sampled_from([1, 4, 16]))
    num_pages = st.integers(-(-least_slots // page_size), {1: 24, 4: 6, 16: 3}[page_size])
    shape = ClusterShape(
        num_instances=draw(st.integers(least_instances, most_instances)),
        num_pages=draw(num_pages | st.just(200) if large_pools else num_pages),
        page_size=page_size,
    )
    return RandomCluster(
        shape=shape,
        max_num_batched_tokens=shape.num_slots * draw(st.integers(1, 2)),
        max_num_seqs=draw(st.sampled_from([1, 2, 16])),
    )


def check_that_all_end(
    engine: ToyEngine, rng: random.Random, add: AddRequest, *, num_requests: int, max_computed: int
) -> None:
    """Every request ends and leaves nothing behind, some aborted, and prefills perhaps slow.

    Args:
        engine: without requests.
        rng: draws what happens next.
        add: adds one of the requests.
        num_requests: how many.
        max_computed: how often each token may be computed, on average: as often as its request is preempted or moved.
    """
    budget = 0
    has_aborts = rng.random() < 0.5
    is_prefill_slow = rng.random() < 0.5
    while num_requests or engine.in_flight:
        if num_requests and (not engine.in_flight or rng.random() < 0.3):
            num_requests -= 1
            budget += max_computed * (add(engine, rng).max_tokens + 1)
        elif has_aborts and rng.random() < 0.05:
            engine.abort(rng.choice(sorted(engine.jobs)))
        else:
            index = rng.randrange(len(engine.in_flight))
            if is_prefill_slow and isinstance(engine.in_flight[index].plan, Prefill) and rng.random() < 0.9:
                index = rng.randrange(len(engine.in_flight))
            engine.complete(index)
        engine.ask()
        num_iterations = sum(not isinstance(plan, Preempt) for plan in engine.history)
        assert num_iterations <= budget, "iterations without progress"
    assert not engine.jobs
    assert all(engine.cache.used_pages(instance) == 0 for instance in engine.shape.all_instances)


def check_that_the_oldest_goes_on(
    engine: ToyEngine, rng: random.Random, add: AddRequest, *, num_completions: int, patience: int | None = None
) -> None:
    """Of eight requests the oldest is never preempted, and with `patience` gets a token within so many completions."""
    num_still, oldest, num_generated = 0, "", -1
    for _ in range(num_completions):
        while len(engine.jobs) < 8:
            add(engine, rng)
        before = min(engine.jobs.values(), key=lambda job: job.order)
        preempted = [name for plan in engine.ask() if isinstance(plan, Preempt) for name in plan.request_ids]
        assert before.request_id not in preempted
        engine.complete(rng.randrange(len(engine.in_flight)))
        if (before.request_id, before.num_generated) != (oldest, num_generated):
            num_still, oldest, num_generated = 0, before.request_id, before.num_generated
        num_still += 1
        assert patience is None or num_still <= patience, f"{before} got no token in {num_still} completions"


def check_that_these_end(
    engine: ToyEngine, rng: random.Random, first: Sequence[Job], add_later: AddRequest, *, patience: int
) -> None:
    """These requests end though four others always wait, in `patience` completions a token and instance."""
    budget = patience * sum(job.max_tokens + 2 for job in first) * engine.shape.num_instances
    while any(job.request_id in engine.jobs for job in first):
        while len(engine.waiting) < 4:
            add_later(engine, rng)
        engine.ask()
        engine.complete(rng.randrange(len(engine.in_flight)))
        budget -= 1
        assert budget > 0, [job for job in first if job.request_id in engine.jobs]


def check_that_few_prefills_pass(
    engine: ToyEngine, rng: random.Random, add: AddRequest, *, num_completions: int, most: int
) -> None:
    """Of eight requests, none that runs lets more than `most` prefills pass before its next token."""
    passed: collections.Counter[str] = collections.Counter()
    for _ in range(num_completions):
        while len(engine.jobs) < 8:
            add(engine, rng)
        view = engine.view()
        count_passed(view, engine.ask(), passed)
        assert max(passed.values(), default=0) <= most, passed
        engine.complete(rng.randrange(len(engine.in_flight)))


def count_passed(view: ClusterView, answer: Sequence[Plan], passed: collections.Counter[str]) -> None:
    """Adds 1 for each request that stands still for a prefill, and forgets those whose group decodes.

    The oldest request of all may pass anybody. Who finds no seat in a decode stands back for older ones in it.
    """
    orders = {request.request_id: request.order for request in (*view.waiting, *view.running)}
    oldest = min(orders, key=orders.__getitem__)
    preempted = {name for plan in answer if isinstance(plan, Preempt) for name in plan.request_ids}
    decodes = [set(plan.group.instances) for plan in answer if isinstance(plan, Decode)]
    prefills = [plan for plan in answer if isinstance(plan, Prefill)]
    passing = [plan for plan in prefills if oldest not in [request.request_id for request in plan.requests]]
    for request in view.running:
        instances = {instance for instance, _ in request.kv}
        if request.request_id in preempted or any(instances <= group for group in decodes):
            passed.pop(request.request_id, None)
        elif not request.is_in_flight and any(not instances.isdisjoint(plan.group.instances) for plan in passing):
            passed[request.request_id] += 1


def check_that_twins_agree(engine: ToyEngine, twin: ToyEngine) -> None:
    """Two engines with the same policy and requests do the same; so would copies of the policy, whenever asked."""
    engine.run()
    twin.ask()
    while twin.in_flight:
        twin.complete(0)
        twin.policy.observe(twin.news)
        twin.news = []
        answer = twin.policy.copy().plan(twin.view())
        assert twin.ask() == answer
    assert engine.history == twin.history


def check_kinds_of_plans(make_policy: Callable[[], Policy], add: AddRequest, expected: set[type[Plan]]) -> None:
    """For ten requests in three small pools a policy plans these kinds and no others: all of them in twenty seeds."""
    kinds: set[type] = set()
    for seed in range(20):
        rng = random.Random(seed)
        engine = ToyEngine(make_policy(), ClusterShape(num_instances=3, num_pages=8, page_size=4))
        for _ in range(10):
            add(engine, rng)
        engine.run()
        kinds.update(type(plan) for plan in engine.history)
        assert kinds <= expected
        if kinds == expected:
            return
    raise AssertionError(f"never planned: {expected - kinds}")
