"""The ESP policy under random clusters, requests, completion orders and aborts: everything ends, nothing leaks."""

import dataclasses
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.core.cluster import ClusterShape
from loongjax.core.plan import Decode, Migrate, Preempt, Prefill
from loongjax.core.request import NO_SLO, ServiceLevel
from loongjax.costmodel.roofline import DeviceRates, RooflineModel
from loongjax.scheduler.esp.config import EspConfig
from loongjax.scheduler.esp.explain import Decision
from loongjax.scheduler.esp.policy import EspPolicy
from tests.costmodel.shapes import LLAMA2_7B
from tests.scheduler.toy_engine import ToyEngine

RATES = {
    "compute": {"flops_per_s": 1e13, "memory_bytes_per_s": 1e15, "link_bytes_per_s": 1e14},
    "memory": {"flops_per_s": 1e18, "memory_bytes_per_s": 1e12, "link_bytes_per_s": 1e11},
    "balanced": {"flops_per_s": 6e14, "memory_bytes_per_s": 4e12, "link_bytes_per_s": 1.5e11},
}


def model(kind: str, overhead_s: float = 2e-5) -> RooflineModel:
    rates = DeviceRates(name=kind, layer_overhead_s=overhead_s, collective_s=overhead_s, **RATES[kind])
    return RooflineModel(rates=rates, model=LLAMA2_7B)


@dataclasses.dataclass(frozen=True)
class Setup:
    shape: ClusterShape
    config: EspConfig
    kind: str
    max_num_batched_tokens: int
    max_num_seqs: int

    def engine(self) -> ToyEngine:
        return ToyEngine(
            EspPolicy(self.config, model(self.kind), explain=check_decision),
            self.shape,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
        )


def check_decision(decision: Decision) -> None:
    assert decision.cost >= 0.0
    assert decision.instances or decision.step == "senior"
    if decision.step in ("dispatch", "scale-up", "scale-down"):
        assert decision.is_taken == (decision.gain > decision.cost)


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    """Pools from one longest request in the whole cluster upwards."""
    page_size = draw(st.sampled_from([1, 4, 16]))
    shape = ClusterShape(
        num_instances=draw(st.integers(1, 5)),
        num_pages=draw(st.integers(1, {1: 24, 4: 6, 16: 3}[page_size]) | st.just(200)),
        page_size=page_size,
    )
    config = EspConfig(
        admission=draw(st.sampled_from(["quantile", "worst-case"])),
        scale_up=draw(st.booleans()),
        max_picked=draw(st.sampled_from([1, 3, 64])),
        max_lookahead=draw(st.integers(0, 8)),
        max_overtakes=draw(st.integers(0, 4)),
        max_prefills_before_decode=draw(st.integers(1, 4)),
        growth_tokens=draw(st.sampled_from([0, 2, 16])),
        min_tokens_between_migrations=draw(st.sampled_from([1, 4])),
    )
    return Setup(
        shape=shape,
        config=config,
        kind=draw(st.sampled_from(sorted(RATES))),
        max_num_batched_tokens=shape.num_slots * draw(st.integers(1, 2)),
        max_num_seqs=draw(st.sampled_from([1, 2, 16])),
    )


def draw_lengths(rng: random.Random, engine: ToyEngine) -> tuple[int, int]:
    """A prompt and an output limit that together fit the empty cluster; the last token needs no slot."""
    num_slots = engine.shape.num_instances * engine.shape.num_slots
    total = num_slots + 1 if rng.random() < 0.2 else rng.randint(2, min(num_slots + 1, 60))
    prompt = rng.randint(max(1, total - 30), total - 1)
    return (prompt, 0) if rng.random() < 0.1 else (prompt, total - prompt)


def draw_wishes(rng: random.Random) -> tuple[int, ServiceLevel]:
    if rng.random() < 0.5:
        return 0, NO_SLO
    return rng.choice([-1, 0, 0, 2]), ServiceLevel(ttft_s=rng.choice([None, 3.0]), tpot_s=rng.choice([None, 1.5]))


@settings(max_examples=40, deadline=None)
@given(setup=setups(), num_requests=st.integers(1, 12), seed=st.integers(0, 2**32))
def test_every_request_ends_and_nothing_leaks(setup: Setup, num_requests: int, seed: int):
    rng, engine = random.Random(seed), setup.engine()
    budget = 0
    has_aborts = rng.random() < 0.5
    is_prefill_slow = rng.random() < 0.5
    while num_requests or engine.in_flight:
        if num_requests and (not engine.in_flight or rng.random() < 0.3):
            num_requests -= 1
            priority, slo = draw_wishes(rng)
            job = engine.add(*draw_lengths(rng, engine), priority=priority, slo=slo)
            budget += 3 * (job.max_tokens + 1)
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


@settings(max_examples=15, deadline=None)
@given(setup=setups(), seed=st.integers(0, 2**32))
def test_the_oldest_request_is_never_preempted_and_never_stands_still(setup: Setup, seed: int):
    rng, engine = random.Random(seed), setup.engine()
    num_still, oldest, num_generated = 0, "", -1
    patience = 40 + 30 * engine.shape.num_instances
    for _ in range(120):
        while len(engine.jobs) < 8:
            priority, slo = draw_wishes(rng)
            engine.add(*draw_lengths(rng, engine), priority=priority, slo=slo)
        before = min(engine.jobs.values(), key=lambda job: job.order)
        plans = engine.ask()
        preempted = [name for plan in plans if isinstance(plan, Preempt) for name in plan.request_ids]
        assert before.request_id not in preempted
        engine.complete(rng.randrange(len(engine.in_flight)))
        if (before.request_id, before.num_generated) != (oldest, num_generated):
            num_still, oldest, num_generated = 0, before.request_id, before.num_generated
        num_still += 1
        assert num_still <= patience, f"{before} got no token in {num_still} completions"


@settings(max_examples=10, deadline=None)
@given(setup=setups(), seed=st.integers(0, 2**32))
def test_every_waiting_and_running_request_ends_under_endless_arrivals(setup: Setup, seed: int):
    rng, engine = random.Random(seed), setup.engine()
    num_slots = engine.shape.num_instances * engine.shape.num_slots
    first = [engine.add(rng.randint(1, num_slots), rng.randint(0, 1), priority=rng.choice([0, 1])) for _ in range(4)]
    budget = 60 * sum(job.max_tokens + 2 for job in first) * engine.shape.num_instances
    while any(job.request_id in engine.jobs for job in first):
        while len(engine.waiting) < 4:
            engine.add(rng.randint(1, min(4, engine.shape.num_slots)), 1)
        engine.ask()
        engine.complete(rng.randrange(len(engine.in_flight)))
        budget -= 1
        assert budget > 0, [job for job in first if job.request_id in engine.jobs]


@settings(max_examples=10, deadline=None)
@given(setup=setups(), num_requests=st.integers(1, 10), seed=st.integers(0, 2**32))
def test_equal_questions_get_equal_answers(setup: Setup, num_requests: int, seed: int):
    twin = setup.engine()
    rng, engine = random.Random(seed), setup.engine()
    for _ in range(num_requests):
        lengths = draw_lengths(rng, engine)
        engine.add(*lengths)
        twin.add(*lengths)
    engine.run()
    twin.run()
    assert engine.history == twin.history


def test_the_simulation_reaches_every_kind_of_plan():
    kinds: set[type] = set()
    for seed in range(20):
        rng = random.Random(seed)
        shape = ClusterShape(num_instances=3, num_pages=8, page_size=4)
        engine = ToyEngine(
            EspPolicy(EspConfig(growth_tokens=2, min_tokens_between_migrations=4), model("balanced")), shape
        )
        for _ in range(10):
            engine.add(*draw_lengths(rng, engine))
        engine.run()
        kinds.update(type(plan) for plan in engine.history)
    assert kinds == {Prefill, Decode, Migrate, Preempt}
