"""The ESP policy under random clusters, requests, completion orders and aborts: everything ends, nothing leaks."""

import collections
import dataclasses
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.core.cluster import ClusterShape
from loongjax.core.plan import Decode, Migrate, Plan, Preempt, Prefill
from loongjax.core.request import NO_SLO, ServiceLevel
from loongjax.costmodel.roofline import DeviceRates, RooflineModel
from loongjax.costmodel.work import PrefillWork
from loongjax.scheduler.esp.config import EspConfig
from loongjax.scheduler.esp.explain import Decision
from loongjax.scheduler.esp.policy import EspPolicy
from loongjax.scheduler.view import FlightView
from tests.costmodel.shapes import LLAMA2_7B
from tests.scheduler.esp.explained import check_terms
from tests.scheduler.esp.hand_model import HandModel
from tests.scheduler.random_traces import (
    RandomCluster,
    check_kinds_of_plans,
    check_that_all_end,
    check_that_few_prefills_pass,
    check_that_the_oldest_goes_on,
    check_that_these_end,
    check_that_twins_agree,
    clusters,
    count_passed,
)
from tests.scheduler.toy_engine import Job, ToyEngine

RATES = {
    "compute": {"flops_per_s": 1e13, "memory_bytes_per_s": 1e15, "link_bytes_per_s": 1e14},
    "memory": {"flops_per_s": 1e18, "memory_bytes_per_s": 1e12, "link_bytes_per_s": 1e11},
    "balanced": {"flops_per_s": 6e14, "memory_bytes_per_s": 4e12, "link_bytes_per_s": 1.5e11},
}


def model(kind: str, overhead_s: float = 2e-5) -> RooflineModel:
    rates = DeviceRates(name=kind, layer_overhead_s=overhead_s, collective_s=overhead_s, **RATES[kind])
    return RooflineModel(rates=rates, model=LLAMA2_7B)


def check_decision(decision: Decision) -> None:
    assert decision.cost >= 0.0
    assert decision.instances or decision.step == "senior"
    check_terms(decision)
    if decision.step in ("dispatch", "scale-up", "scale-down"):
        assert decision.is_taken == (decision.gain > decision.cost)


CONFIGS = st.builds(
    EspConfig,
    admission=st.sampled_from(["quantile", "worst-case"]),
    scale_up=st.booleans(),
    max_picked=st.sampled_from([1, 3, 64]),
    max_lookahead=st.integers(0, 8),
    max_overtakes=st.integers(0, 4),
    max_prefills_before_decode=st.integers(1, 4),
    growth_tokens=st.sampled_from([0, 2, 16]),
    min_tokens_between_migrations=st.sampled_from([1, 4]),
)


@dataclasses.dataclass(frozen=True)
class Setup:
    cluster: RandomCluster
    config: EspConfig
    kind: str

    def engine(self) -> ToyEngine:
        return self.cluster.engine(EspPolicy(self.config, model(self.kind), explain=check_decision))


SETUPS = st.builds(Setup, clusters(large_pools=True), CONFIGS, st.sampled_from(sorted(RATES)))


def draw_lengths(engine: ToyEngine, rng: random.Random) -> tuple[int, int]:
    """A prompt and an output limit that together fit the empty cluster; the last token needs no slot."""
    num_slots = engine.shape.num_instances * engine.shape.num_slots
    total = num_slots + 1 if rng.random() < 0.2 else rng.randint(2, min(num_slots + 1, 60))
    prompt = rng.randint(max(1, total - 30), total - 1)
    return (prompt, 0) if rng.random() < 0.1 else (prompt, total - prompt)


def draw_wishes(rng: random.Random) -> tuple[int, ServiceLevel]:
    if rng.random() < 0.5:
        return 0, NO_SLO
    return rng.choice([-1, 0, 0, 2]), ServiceLevel(ttft_s=rng.choice([None, 3.0]), tpot_s=rng.choice([None, 1.5]))


def add_request(engine: ToyEngine, rng: random.Random) -> Job:
    return engine.add(*draw_lengths(engine, rng))


def add_wishing_request(engine: ToyEngine, rng: random.Random) -> Job:
    priority, slo = draw_wishes(rng)
    return engine.add(*draw_lengths(engine, rng), priority=priority, slo=slo)


def add_one_token_request(engine: ToyEngine, rng: random.Random, share: float) -> Job:
    """A prompt of up to this share of all pools, or of four tokens, and one token to generate."""
    most = max(min(4, engine.shape.num_slots), int(share * engine.shape.num_instances * engine.shape.num_slots))
    return engine.add(rng.randint(1, most), 1)


@settings(max_examples=40, deadline=None)
@given(setup=SETUPS, num_requests=st.integers(1, 12), seed=st.integers(0, 2**32))
def test_every_request_ends_and_nothing_leaks(setup: Setup, num_requests: int, seed: int):
    check_that_all_end(
        setup.engine(), random.Random(seed), add_wishing_request, num_requests=num_requests, max_computed=3
    )


@settings(max_examples=15, deadline=None)
@given(setup=SETUPS, seed=st.integers(0, 2**32))
def test_the_oldest_request_is_never_preempted_and_never_stands_still(setup: Setup, seed: int):
    """Once it is not overtaken any more."""
    engine = setup.cluster.engine(EspPolicy(dataclasses.replace(setup.config, max_overtakes=0), model(setup.kind)))
    patience = 40 + 30 * engine.shape.num_instances
    check_that_the_oldest_goes_on(
        engine, random.Random(seed), add_wishing_request, num_completions=120, patience=patience
    )


@settings(max_examples=20, deadline=None)
@given(setup=SETUPS, share=st.sampled_from([0.0, 0.2, 0.5, 0.8]), seed=st.integers(0, 2**32))
def test_every_waiting_and_running_request_ends_under_endless_arrivals(setup: Setup, share: float, seed: int):
    rng, engine = random.Random(seed), setup.engine()
    num_slots = engine.shape.num_instances * engine.shape.num_slots
    first = []
    for _ in range(4):
        prompt_len = rng.randint(1, num_slots)
        max_tokens = min(rng.randint(0, 3), num_slots + 1 - prompt_len)
        first.append(engine.add(prompt_len, max_tokens, priority=rng.choice([0, 1])))
    check_that_these_end(engine, rng, first, lambda engine, rng: add_one_token_request(engine, rng, share), patience=60)


@settings(max_examples=40, deadline=None)
@given(setup=SETUPS, seed=st.integers(0, 2**32))
def test_a_running_request_lets_few_prefills_pass(setup: Setup, seed: int):
    check_that_few_prefills_pass(
        setup.engine(),
        random.Random(seed),
        add_wishing_request,
        num_completions=100,
        most=setup.config.max_prefills_before_decode,
    )


def test_a_decode_goes_on_among_long_prompts_that_may_be_overtaken_no_more():
    """Prompts of 32 s fit only where it is; while one of them runs, the next is overtaken by short ones elsewhere."""
    model, config = HandModel(step_s=0.3), EspConfig()

    def duration_s(flight: FlightView) -> float:
        if isinstance(flight.work, PrefillWork):
            return model.token_s * sum(flight.work.new_lens) / flight.group.dop
        return model.step_s

    shape = ClusterShape(num_instances=2, num_pages=250, page_size=16)
    engine = ToyEngine(EspPolicy(config, model), shape, duration_s=duration_s)
    engine.add(2001, 2000)
    engine.ask()
    small = engine.add(1, 1000)
    engine.ask()
    while small.num_generated == 0:
        engine.complete_next()
        engine.ask()
    passed: collections.Counter[str] = collections.Counter()
    while engine.now_s < 100.0:
        for prompt_len in (3200, 1):
            while sum(request.num_tokens == prompt_len for request in engine.waiting) < 2:
                engine.add(prompt_len, 1)
        view = engine.view()
        count_passed(view, engine.ask(), passed)
        assert passed[small.request_id] <= config.max_prefills_before_decode
        engine.complete_next()


@settings(max_examples=10, deadline=None)
@given(setup=SETUPS, num_requests=st.integers(1, 10), seed=st.integers(0, 2**32))
def test_equal_questions_get_equal_answers_also_from_copies(setup: Setup, num_requests: int, seed: int):
    twins = setup.engine(), setup.engine()
    for engine in twins:
        rng = random.Random(seed)
        for _ in range(num_requests):
            add_request(engine, rng)
    check_that_twins_agree(*twins)


def test_the_simulation_reaches_every_kind_of_plan():
    config = EspConfig(growth_tokens=2, min_tokens_between_migrations=4)
    kinds: set[type[Plan]] = {Prefill, Decode, Migrate, Preempt}
    check_kinds_of_plans(lambda: EspPolicy(config, model("balanced")), add_request, kinds)
