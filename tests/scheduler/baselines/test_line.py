"""Who is let in first: by priority, but nobody is passed over for ever."""

from __future__ import annotations

import pytest

from loongjax.config import PolicyName, SchedulingConfig
from loongjax.core.cluster import ClusterShape
from loongjax.core.plan import Extend, Plan, Prefill
from loongjax.scheduler.baselines.line import MAX_OVERTAKES, Line
from loongjax.scheduler.build import build_policy
from tests.scheduler.toy_engine import ToyEngine
from tests.scheduler.views import waiting

URGENT, OLD, YOUNG = waiting("urgent", 2, 1, priority=-1), waiting("old", 0, 1), waiting("young", 1, 1)
QUEUE = [URGENT, OLD, YOUNG]


def after(num_overtakes: int) -> Line:
    """A line after others were let in so often before the oldest."""
    line = Line()
    for _ in range(num_overtakes):
        line.note_let_in(QUEUE, [URGENT])
    return line


def test_a_line_is_the_queue() -> None:
    assert after(0).in_order(QUEUE) == QUEUE
    assert after(MAX_OVERTAKES - 1).in_order(QUEUE) == QUEUE


def test_the_oldest_comes_first_after_enough_others() -> None:
    assert after(MAX_OVERTAKES).in_order(QUEUE) == [OLD, URGENT, YOUNG]


def test_once_it_is_let_in_others_may_go_before_the_next_one() -> None:
    line = after(MAX_OVERTAKES)
    line.note_let_in(QUEUE, [OLD, URGENT])
    left = [URGENT, YOUNG]
    assert line.in_order(left) == left


def test_a_copy_counts_for_itself() -> None:
    line = after(MAX_OVERTAKES - 1)
    other = line.copy()
    other.note_let_in(QUEUE, [URGENT])
    assert (line.in_order(QUEUE), other.in_order(QUEUE)) == (QUEUE, [OLD, URGENT, YOUNG])


def test_nobody_is_in_no_line() -> None:
    assert after(MAX_OVERTAKES).in_order([]) == []


def first_computed(plans: list[Plan]) -> list[str]:
    """Requests in the order in which their prompts were begun."""
    names: dict[str, None] = {}
    for plan in plans:
        if isinstance(plan, Prefill):
            names |= dict.fromkeys(request.request_id for request in plan.requests)
        elif isinstance(plan, Extend):
            names |= dict.fromkeys(chunk.request_id for chunk in plan.chunks)
    return list(names)


@pytest.mark.parametrize("name", ["static", "replicated", "prefill-first", "chunked", "disaggregated"])
def test_under_every_baseline_lower_priorities_go_first(name: PolicyName) -> None:
    shape = ClusterShape(num_instances=2 if name == "disaggregated" else 1, num_pages=64, page_size=4)
    policy = build_policy(SchedulingConfig(policy=name), shape=shape, max_num_seqs=1)
    engine = ToyEngine(policy, shape, max_num_seqs=1)
    for priority in (0, 5, 0, -3, 5, -3):
        engine.add(10, 3, priority=priority)
    engine.run()
    assert first_computed(engine.history) == ["r3", "r5", "r0", "r2", "r1", "r4"]


@pytest.mark.parametrize("name", ["static", "prefill-first", "chunked"])
def test_under_endless_arrivals_that_go_first_the_oldest_waits_for_so_many_and_no_longer(name: PolicyName) -> None:
    shape = ClusterShape(num_instances=1, num_pages=64, page_size=4)
    policy = build_policy(SchedulingConfig(policy=name), shape=shape, max_num_seqs=1)
    engine = ToyEngine(policy, shape, max_num_seqs=1)
    patient = engine.add(10, 3)
    while patient.request_id in engine.jobs:
        while len(engine.waiting) < 3:
            engine.add(10, 3, priority=-1)
        engine.ask()
        engine.complete(0)
    assert first_computed(engine.history).index(patient.request_id) == MAX_OVERTAKES
