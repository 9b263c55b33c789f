"""The baselines under random clusters, requests, completion orders and aborts: everything ends, nothing leaks."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.config import PolicyName, SchedulingConfig
from loongjax.scheduler.build import build_policy, max_request_tokens
from tests.scheduler.random_traces import (
    RandomCluster,
    check_that_all_end,
    check_that_the_oldest_goes_on,
    check_that_these_end,
    check_that_twins_agree,
    clusters,
)
from tests.scheduler.toy_engine import Job, ToyEngine

BASELINES: tuple[PolicyName, ...] = ("static", "replicated", "prefill-first", "chunked", "disaggregated")
EACH = pytest.mark.parametrize("name", BASELINES)


@dataclasses.dataclass(frozen=True)
class Setup:
    """A policy and its cluster."""

    name: PolicyName
    cluster: RandomCluster
    priorities: tuple[int, ...]
    """From which those of requests are drawn."""

    def engine(self) -> ToyEngine:
        config = SchedulingConfig(policy=self.name)
        return self.cluster.engine(
            build_policy(config, shape=self.cluster.shape, max_num_seqs=self.cluster.max_num_seqs)
        )

    def add(self, engine: ToyEngine, rng: random.Random) -> Job:
        """A prompt and an output limit that together are no longer than the policy promises to carry."""
        config = SchedulingConfig(policy=self.name)
        longest = max_request_tokens(config, self.cluster.shape, self.cluster.max_num_batched_tokens)
        total = longest if rng.random() < 0.2 else rng.randint(2, longest)
        prompt = rng.randint(1, total - 1)
        priority = rng.choice(self.priorities)
        return engine.add(prompt, 0 if rng.random() < 0.1 else total - prompt, priority=priority)


def setups(name: PolicyName) -> st.SearchStrategy[Setup]:
    """Pools from one longest request of the policy upwards."""
    least, most = {"prefill-first": (1, 1), "disaggregated": (2, 5)}.get(name, (1, 5))
    drawn = clusters(least_instances=least, most_instances=most, least_slots=2)
    priorities = st.sampled_from([(0,), (0, 0, 0, -1), (-1, 0, 1)])
    return st.builds(Setup, st.just(name), drawn, priorities)


@EACH
@settings(max_examples=20, deadline=None)
@given(data=st.data(), num_requests=st.integers(1, 14), seed=st.integers(0, 2**32))
def test_every_request_ends_and_nothing_leaks(name: PolicyName, data: st.DataObject, num_requests: int, seed: int):
    setup = data.draw(setups(name))
    check_that_all_end(setup.engine(), random.Random(seed), setup.add, num_requests=num_requests, max_computed=4)


@EACH
@settings(max_examples=8, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_the_oldest_request_is_never_preempted(name: PolicyName, data: st.DataObject, seed: int):
    setup = data.draw(setups(name))
    check_that_the_oldest_goes_on(setup.engine(), random.Random(seed), setup.add, num_completions=60)


@EACH
@settings(max_examples=8, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_every_waiting_and_running_request_ends_under_endless_arrivals(
    name: PolicyName, data: st.DataObject, seed: int
):
    setup = data.draw(setups(name))
    rng, engine = random.Random(seed), setup.engine()
    first = [setup.add(engine, rng) for _ in range(4)]
    check_that_these_end(engine, rng, first, lambda engine, rng: engine.add(1, 1), patience=100)


@EACH
@settings(max_examples=8, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_every_request_ends_also_if_all_that_arrive_later_go_first(name: PolicyName, data: st.DataObject, seed: int):
    setup = data.draw(setups(name))
    rng, engine = random.Random(seed), setup.engine()
    first = [setup.add(engine, rng) for _ in range(4)]
    check_that_these_end(engine, rng, first, lambda engine, rng: engine.add(1, 1, priority=-2), patience=400)


@EACH
@settings(max_examples=6, deadline=None)
@given(data=st.data(), num_requests=st.integers(1, 10), seed=st.integers(0, 2**32))
def test_equal_questions_get_equal_answers_also_from_copies(
    name: PolicyName, data: st.DataObject, num_requests: int, seed: int
):
    setup = data.draw(setups(name))
    twins = setup.engine(), setup.engine()
    for engine in twins:
        rng = random.Random(seed)
        for _ in range(num_requests):
            setup.add(engine, rng)
    check_that_twins_agree(*twins)
