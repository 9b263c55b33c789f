"""The baselines under random clusters, requests, completion orders and aborts: everything ends, nothing leaks."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.config import PolicyName
from loongjax.core.plan import Preempt, Prefill
from tests.scheduler.baselines.traces import BASELINES, Setup, setups

EACH = pytest.mark.parametrize("name", BASELINES)


@EACH
@settings(max_examples=20, deadline=None)
@given(data=st.data(), num_requests=st.integers(1, 14), seed=st.integers(0, 2**32))
def test_every_request_ends_and_nothing_leaks(name: PolicyName, data: st.DataObject, num_requests: int, seed: int):
    setup: Setup = data.draw(setups(name))
    rng, engine = random.Random(seed), setup.engine()
    budget = 0
    has_aborts = rng.random() < 0.5
    is_prefill_slow = rng.random() < 0.5
    while num_requests or engine.in_flight:
        if num_requests and (not engine.in_flight or rng.random() < 0.3):
            num_requests -= 1
            # Each token may be computed, and its request handed over, as often as it is preempted.
            budget += 4 * (setup.add(engine, rng).max_tokens + 1)
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


@EACH
@settings(max_examples=8, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_the_oldest_request_is_never_preempted(name: PolicyName, data: st.DataObject, seed: int):
    setup: Setup = data.draw(setups(name))
    rng, engine = random.Random(seed), setup.engine()
    for _ in range(60):
        while len(engine.jobs) < 8:
            setup.add(engine, rng)
        oldest = min(engine.jobs.values(), key=lambda job: job.order)
        preempted = [name for plan in engine.ask() if isinstance(plan, Preempt) for name in plan.request_ids]
        assert oldest.request_id not in preempted
        engine.complete(rng.randrange(len(engine.in_flight)))


@EACH
@settings(max_examples=8, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_every_waiting_and_running_request_ends_under_endless_arrivals(
    name: PolicyName, data: st.DataObject, seed: int
):
    setup: Setup = data.draw(setups(name))
    rng, engine = random.Random(seed), setup.engine()
    first = [setup.add(engine, rng) for _ in range(4)]
    budget = 100 * sum(job.max_tokens + 2 for job in first) * engine.shape.num_instances
    while any(job.request_id in engine.jobs for job in first):
        while len(engine.waiting) < 4:
            engine.add(1, 1)
        engine.ask()
        engine.complete(rng.randrange(len(engine.in_flight)))
        budget -= 1
        assert budget > 0, [job for job in first if job.request_id in engine.jobs]


@EACH
@settings(max_examples=6, deadline=None)
@given(data=st.data(), num_requests=st.integers(1, 10), seed=st.integers(0, 2**32))
def test_equal_questions_get_equal_answers_also_from_copies(
    name: PolicyName, data: st.DataObject, num_requests: int, seed: int
):
    setup: Setup = data.draw(setups(name))
    rng, engine, twin = random.Random(seed), setup.engine(), setup.engine()
    for _ in range(num_requests):
        lengths = setup.draw_lengths(rng)
        engine.add(*lengths)
        twin.add(*lengths)
    engine.run()
    twin.ask()
    while twin.in_flight:
        twin.complete(0)
        twin.policy.observe(twin.news)
        twin.news = []
        answer = twin.policy.copy().plan(twin.view())
        assert twin.ask() == answer
    assert engine.history == twin.history
