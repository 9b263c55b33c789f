from typing import Any

import pytest

from loongjax.core.cluster import Group
from loongjax.core.plan import Decode, Plan, Preempt
from loongjax.scheduler.baselines.decoding import plan_decode
from loongjax.scheduler.request_view import RunningView
from loongjax.scheduler.validate import check_plan
from tests.scheduler.views import cluster, running


def ask(runs: list[RunningView], num_instances: int = 2, **limits: Any) -> tuple[Plan, ...]:
    view = cluster(num_instances, runs=runs, **limits)
    plans = plan_decode(view, Group(view.shape.all_instances), runs)
    check_plan(view, plans)
    return plans


def test_one_master_decodes_for_everybody():
    (plan,) = ask([running("a", 0, (0, 9), (1, 8)), running("b", 1, (1, 3)), running("c", 2, (1, 5))])
    assert isinstance(plan, Decode)
    assert [(batch.master, batch.request_ids) for batch in plan.sub_batches] == [(1, ("a", "b", "c"))]
    assert plan.group == Group((0, 1))


def test_the_master_stays_the_same_as_long_as_it_has_pages():
    runs = [running("a", 0, (1, 2), (0, 4)), running("b", 1, (0, 8))]
    (plan,) = ask(runs, taken={0: 90})
    assert isinstance(plan, Decode)
    assert plan.masters == (0,)


def test_a_full_master_keeps_those_that_need_no_page_and_hands_over_the_rest():
    runs = [running("a", 0, (0, 3)), running("b", 1, (0, 4))]
    (plan,) = ask(runs, num_pages=2)
    assert isinstance(plan, Decode)
    assert [(batch.master, batch.request_ids) for batch in plan.sub_batches] == [(0, ("a",)), (1, ("b",))]


def test_a_page_that_is_not_full_is_found_wherever_it_is():
    runs = [running("a", 0, (0, 3), (1, 4))]
    (plan,) = ask(runs, num_pages=1)
    assert isinstance(plan, Decode)
    assert plan.masters == (0,)


def test_the_newest_is_preempted_if_pages_are_short_and_no_more_than_needed():
    runs = [running("old", 0, (0, 4)), running("middle", 1, (1, 4)), running("new", 2, (0, 4))]
    preemption, decode = ask(runs, taken={0: 97, 1: 99})
    assert preemption == Preempt(("new",))
    assert isinstance(decode, Decode)
    assert sorted(decode.request_ids) == ["middle", "old"]


def test_nobody_running_is_nothing_to_do():
    assert ask([]) == ()


def test_a_request_alone_that_cannot_grow_was_never_to_be_accepted():
    with pytest.raises(AssertionError, match="no page to grow into"):
        ask([running("a", 0, (0, 8))], num_instances=1, num_pages=2)
