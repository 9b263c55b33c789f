"""Instances for the oldest request, whatever that costs the others: which ones, and who makes way."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from loongjax.core.plan import Plan, Preempt, Prefill
from loongjax.scheduler.draft import Draft
from loongjax.scheduler.esp.outlook import Outlook
from loongjax.scheduler.esp.output_lengths import OutputLengths
from loongjax.scheduler.esp.senior import SeniorPlanner, senior_of
from loongjax.scheduler.esp.times import Times
from loongjax.scheduler.request_view import RunningView
from loongjax.scheduler.validate import check_plan
from loongjax.scheduler.view import ClusterView
from tests.scheduler.esp.hand_model import HandModel
from tests.scheduler.views import cluster, running, waiting


def plans_of(view: ClusterView, *, is_oldest: bool = True, barred: Sequence[int] = ()) -> tuple[Plan, ...]:
    """What it takes to prefill the first request, if that can be done now."""
    draft = Draft(view, 0)
    outlook = Outlook(draft, Times(HandModel(), 1), barred, OutputLengths())
    assert SeniorPlanner(draft, outlook, 0).plan(view.waiting[0], is_oldest=is_oldest) == draft.has_prefills
    check_plan(view, draft.plans)
    return draft.plans


def full_instance(*others: RunningView) -> ClusterView:
    """Ten pages: two of b, two of c and two of d, four free; the oldest request needs seven of them."""
    runs = [running(name, order, (0, 8)) for order, name in enumerate("bcd", start=1)]
    return cluster(1, num_pages=10, runs=[*runs, *others], waits=[waiting("a", 0, 28)])


def test_the_newest_make_way_and_no_more_of_them_than_it_takes() -> None:
    """7 pages are needed and 4 free: those of d and c."""
    first, second = plans_of(full_instance())
    assert first == Preempt(("d", "c"))
    assert isinstance(second, Prefill)


def test_nobody_makes_way_for_a_request_that_is_not_the_oldest() -> None:
    assert plans_of(full_instance(), is_oldest=False) == ()


def test_nobody_makes_way_who_is_being_computed() -> None:
    """d has keys on 1, too, where a step goes on."""
    runs = [running(name, order, (0, 8)) for order, name in enumerate("bc", start=1)]
    flying = running("d", 3, (0, 8), (1, 4), is_in_flight=True)
    view = cluster(2, num_pages=10, runs=[*runs, flying], waits=[waiting("a", 0, 28)], prefilling=[1])
    assert plans_of(view)[0] == Preempt(("c", "b"))


def test_the_emptiest_instance_makes_way() -> None:
    """Nobody is preempted on 0, where both requests would have to be."""
    runs = [running("b", 1, (0, 20)), running("c", 2, (0, 20)), running("d", 3, (1, 20))]
    first, second = plans_of(cluster(2, num_pages=10, runs=runs, waits=[waiting("a", 0, 28)]))
    assert first == Preempt(("d",))
    assert isinstance(second, Prefill)
    assert second.group.instances == (1,)


@pytest.mark.parametrize(("num_tokens", "num_free", "instance"), [(8, 2, 2), (8, 1, 1), (20, 2, 1)])
def test_instances_without_keys_come_first_and_then_those_with_most_free_pages(
    num_tokens: int, num_free: int, instance: int
) -> None:
    """Free are 3 pages on 0 and 8 on 1, where decodes are, and so many on 2, where none are."""
    runs = [running("b", 1, (0, 28)), running("c", 2, (1, 8))]
    view = cluster(3, num_pages=10, runs=runs, waits=[waiting("a", 0, num_tokens)], taken={2: 10 - num_free})
    (plan,) = plans_of(view)
    assert isinstance(plan, Prefill)
    assert plan.group.instances == (instance,)


def test_of_instances_with_keys_that_with_most_free_pages_is_taken() -> None:
    runs = [running("b", 1, (0, 28)), running("c", 2, (1, 8))]
    (plan,) = plans_of(cluster(2, num_pages=10, runs=runs, waits=[waiting("a", 0, 8)]))
    assert isinstance(plan, Prefill)
    assert plan.group.instances == (1,)


def test_only_the_oldest_gets_an_instance_on_which_others_are_due_a_token() -> None:
    view = cluster(1, runs=[running("b", 1, (0, 8))], waits=[waiting("a", 0, 8)])
    assert plans_of(view, is_oldest=False, barred=[0]) == ()
    assert [type(plan) for plan in plans_of(view, barred=[0])] == [Prefill]


def test_a_request_that_keeps_no_keys_needs_no_pages() -> None:
    view = cluster(1, waits=[waiting("a", 0, 8, keeps_kv=False)], taken={0: 99}, runs=[running("b", 1, (0, 4))])
    assert [type(plan) for plan in plans_of(view)] == [Prefill]


def test_the_oldest_of_all_may_wait_behind_others_of_a_higher_priority_but_not_run() -> None:
    waits = [waiting("urgent", 2, 8, priority=-1), waiting("a", 1, 8)]
    assert senior_of(cluster(1, waits=waits)) is waits[1]
    assert senior_of(cluster(1, waits=waits, runs=[running("b", 0, (0, 4))])) is None
    assert senior_of(cluster(1)) is None
