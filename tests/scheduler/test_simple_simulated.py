"""The simple policy under random clusters, requests, completion orders and aborts: everything ends, nothing leaks."""

import dataclasses
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.core.plan import Decode, Migrate, Preempt, Prefill
from loongjax.scheduler.simple import SimplePolicy
from loongjax.scheduler.simple_config import SimplePolicyConfig
from tests.scheduler.random_traces import (
    RandomCluster,
    check_kinds_of_plans,
    check_that_all_end,
    check_that_few_prefills_pass,
    check_that_the_oldest_goes_on,
    check_that_these_end,
    check_that_twins_agree,
    clusters,
)
from tests.scheduler.toy_engine import Job, ToyEngine

CONFIGS = st.builds(
    SimplePolicyConfig,
    prefill_tokens_per_instance=st.sampled_from([1, 8, 64]),
    max_requests_per_master=st.sampled_from([1, 3, 100]),
    growth_tokens=st.sampled_from([0, 2, 16]),
    max_prefills_before_decode=st.integers(1, 4),
    max_overtakes=st.integers(0, 4),
    max_lookahead=st.integers(0, 8),
    max_migrated_tokens=st.sampled_from([0, 8, 1000]),
    min_tokens_between_migrations=st.sampled_from([1, 4]),
)


@dataclasses.dataclass(frozen=True)
class Setup:
    cluster: RandomCluster
    config: SimplePolicyConfig

    def engine(self) -> ToyEngine:
        return self.cluster.engine(SimplePolicy(self.config))


SETUPS = st.builds(Setup, clusters(), CONFIGS)


def add_request(engine: ToyEngine, rng: random.Random) -> Job:
    """A prompt and an output limit that together fit the empty cluster; the last token needs no slot."""
    num_slots = engine.shape.num_instances * engine.shape.num_slots
    total = num_slots + 1 if rng.random() < 0.2 else rng.randint(2, num_slots + 1)
    prompt = rng.randint(1, min(total - 1, num_slots))
    return engine.add(prompt, 0 if rng.random() < 0.1 else total - prompt)


def add_short_request(engine: ToyEngine, rng: random.Random) -> Job:
    return engine.add(rng.randint(1, min(4, engine.shape.num_slots)), 1)


@settings(max_examples=80, deadline=None)
@given(setup=SETUPS, num_requests=st.integers(1, 14), seed=st.integers(0, 2**32))
def test_every_request_ends_and_nothing_leaks(setup: Setup, num_requests: int, seed: int):
    check_that_all_end(setup.engine(), random.Random(seed), add_request, num_requests=num_requests, max_computed=2)


@settings(max_examples=30, deadline=None)
@given(setup=SETUPS, seed=st.integers(0, 2**32))
def test_the_oldest_request_is_never_preempted_and_never_stands_still(setup: Setup, seed: int):
    patience = 40 + 30 * setup.cluster.shape.num_instances
    check_that_the_oldest_goes_on(
        setup.engine(), random.Random(seed), add_request, num_completions=150, patience=patience
    )


@settings(max_examples=20, deadline=None)
@given(setup=SETUPS, seed=st.integers(0, 2**32))
def test_every_waiting_and_running_request_ends_under_endless_arrivals(setup: Setup, seed: int):
    rng, engine = random.Random(seed), setup.engine()
    first = [add_request(engine, rng) for _ in range(4)]
    check_that_these_end(engine, rng, first, add_short_request, patience=60)


@settings(max_examples=20, deadline=None)
@given(setup=SETUPS, seed=st.integers(0, 2**32))
def test_a_running_request_lets_few_prefills_pass(setup: Setup, seed: int):
    check_that_few_prefills_pass(
        setup.engine(),
        random.Random(seed),
        add_request,
        num_completions=100,
        most=setup.config.max_prefills_before_decode,
    )


@settings(max_examples=20, deadline=None)
@given(setup=SETUPS, num_requests=st.integers(1, 10), seed=st.integers(0, 2**32))
def test_equal_questions_get_equal_answers_also_from_copies(setup: Setup, num_requests: int, seed: int):
    twins = setup.engine(), setup.engine()
    for engine in twins:
        rng = random.Random(seed)
        for _ in range(num_requests):
            add_request(engine, rng)
    check_that_twins_agree(*twins)


def test_the_simulation_reaches_every_kind_of_plan():
    config = SimplePolicyConfig(prefill_tokens_per_instance=16, growth_tokens=2, min_tokens_between_migrations=4)
    check_kinds_of_plans(lambda: SimplePolicy(config), add_request, {Prefill, Decode, Migrate, Preempt})
