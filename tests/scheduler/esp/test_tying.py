"""Requests that no decode group has room for by itself."""

from __future__ import annotations

import pytest

from loongjax.core.cluster import Group
from loongjax.core.plan import Decode, Plan, Prefill, PrefillRequest
from loongjax.costmodel.work import PrefillWork
from loongjax.scheduler.draft import Draft
from loongjax.scheduler.esp.explain import Decision
from loongjax.scheduler.esp.outlook import Outlook, Site
from loongjax.scheduler.esp.output_lengths import OutputLengths
from loongjax.scheduler.esp.times import Times
from loongjax.scheduler.esp.tying import cost_of_tie, tied
from loongjax.scheduler.request_view import RunningView
from loongjax.scheduler.view import FlightView
from tests.scheduler.esp.hand_model import HandModel, ask, only
from tests.scheduler.views import cluster, running, waiting


def answer(
    num_pages: int, row_s: float, *, num_instances: int = 2, max_new_tokens: int = 4
) -> tuple[tuple[Plan, ...], list[Decision]]:
    """Instances of 100 pages of 4 tokens, each with a decode that fills 56 of them and is half way through 100 tokens.
    The prompt takes 0.04 s a page of one instance.
    """
    runs = half_way(num_instances)
    num_tokens = num_pages * 4
    waits = [waiting("w", num_instances, num_tokens, max_total_tokens=num_tokens + max_new_tokens)]
    return ask(cluster(num_instances, num_pages=100, runs=runs, waits=waits), HandModel(step_s=1.0, row_s=row_s))


def half_way(num_instances: int) -> list[RunningView]:
    """A decode on each instance, as in `answer`."""
    return [
        running(f"r{instance}", instance, (instance, 224), num_output_tokens=50, max_new_tokens=50)
        for instance in range(num_instances)
    ]


def instances_kept(plans: tuple[Plan, ...]) -> list[int]:
    (prefill,) = [plan for plan in plans if isinstance(plan, Prefill)]
    (request,) = prefill.requests
    assert sum(interval.end - interval.begin for interval in request.kept) == request.kept[-1].end
    return sorted(interval.instance for interval in request.kept)


def test_it_is_cut_over_groups_that_have_room_together() -> None:
    plans, decisions = answer(48, row_s=0.2)
    assert instances_kept(plans) == [0, 1]
    decision = only(decisions, "tie")
    # One of them ends in 50 steps of 1.2 s. Both stand still for 0.96 s, then take 0.2 s longer for half their tokens.
    assert decision.gain == pytest.approx(50 * 1.2 / 192)
    assert decision.cost == pytest.approx(0.96 * 2 / 100 + 2 * 0.2 * 50 / 100)
    assert decision.instances == (0, 1)
    assert dict(decision.terms)["tie_weight_s"] == pytest.approx(0.2)


def test_it_waits_for_one_of_them_where_a_tie_costs_more() -> None:
    plans, decisions = answer(48, row_s=0.5)
    assert [type(plan) for plan in plans] == [Decode, Decode]
    decision = only(decisions, "tie")
    assert (decision.is_taken, decision.gain < decision.cost) == (False, True)


def test_no_more_groups_are_tied_than_have_room() -> None:
    plans, _ = answer(60, row_s=0.01, num_instances=4)
    assert instances_kept(plans) == [0, 1]
    decodes = [plan.group for plan in plans if isinstance(plan, Decode)]
    assert decodes == [Group.of([2]), Group.of([3])]
    plans, _ = answer(120, row_s=0.001, num_instances=4)
    assert instances_kept(plans) == [0, 1, 2]


@pytest.mark.parametrize(
    ("num_pages", "max_new_tokens"),
    [pytest.param(95, 4, id="no room anywhere"), pytest.param(80, 400, id="no room for what it may become")],
)
def test_without_room_there_is_no_tie(num_pages: int, max_new_tokens: int) -> None:
    plans, decisions = answer(num_pages, row_s=0.01, max_new_tokens=max_new_tokens)
    assert [type(plan) for plan in plans] == [Decode, Decode]
    assert not [decision for decision in decisions if decision.step == "tie"]


def test_a_request_that_one_group_has_room_for_is_not_cut() -> None:
    _, decisions = answer(40, row_s=0.01)
    assert not [decision for decision in decisions if decision.step == "tie"]


def test_without_a_seat_there_is_no_tie() -> None:
    """It would hold memory, and wait for its second token until somebody has ended."""
    waits = [waiting("w", 2, 192, max_total_tokens=196)]
    for max_num_seqs, num_ties in ((1, 0), (2, 1)):
        view = cluster(2, num_pages=100, runs=half_way(2), waits=waits, max_num_seqs=max_num_seqs)
        plans, decisions = ask(view, HandModel(step_s=1.0))
        assert len([decision for decision in decisions if decision.step == "tie"]) == num_ties
        assert len([plan for plan in plans if isinstance(plan, Prefill)]) == num_ties


def test_it_waits_for_a_prefill_that_leaves_an_instance_without_keys() -> None:
    plan = Prefill(Group.of([2]), (PrefillRequest("echo", ()),))
    flight = FlightView(plan=plan, group=plan.group, work=PrefillWork(new_lens=(50,)), started_s=0.0)
    waits = [waiting("w", 3, 192, max_total_tokens=196)]
    view = cluster(3, num_pages=100, runs=half_way(2), waits=waits, prefilling=[2], flights=[flight])
    plans, decisions = ask(view, HandModel(step_s=1.0))
    decision = only(decisions, "tie")
    assert (decision.is_taken, decision.gain) == (False, pytest.approx(0.5 / 192))
    assert [type(plan) for plan in plans] == [Decode, Decode]


def test_instances_without_keys_are_filled_before_decode_groups_are_tied() -> None:
    """It is longer than any instance."""
    waits = [waiting("w", 3, 480, max_total_tokens=484)]
    view = cluster(4, num_pages=100, runs=half_way(3), waits=waits)
    plans, decisions = ask(view, HandModel(step_s=1.0))
    assert instances_kept(plans) == [0, 3]
    # Nobody is slowed down by an instance without decodes.
    assert dict(only(decisions, "tie").terms)["tie_weight_s"] == 0.0
    assert [plan.group for plan in plans if isinstance(plan, Decode)] == [Group.of([1]), Group.of([2])]


def test_groups_that_are_tied_are_idle_when_the_last_of_them_is() -> None:
    site = tied([Site(instances=(1,), ready_s=2.0), Site(instances=(0, 3), ready_s=1.0)])
    assert (site.instances, site.ready_s) == ((0, 1, 3), 2.0)


def test_who_takes_shorter_steps_in_a_tie_makes_up_for_nobody() -> None:
    """With keys of 1 ms each, steps take 0.8 and 0.1 s apart, and 0.45 s together. Only b's become longer; it is half
    way, so half of its output's time is still to come."""
    runs = [running("a", 0, (0, 800), num_output_tokens=50), running("b", 1, (1, 100), num_output_tokens=50)]
    times = Times(HandModel(step_s=0.0, key_s=0.001), 1)
    outlook = Outlook(Draft(cluster(2, num_pages=1000, runs=runs), 0), times, (), OutputLengths())
    assert cost_of_tie(outlook.decodes, times, 0.0) == pytest.approx(0.5 * (0.45 - 0.1))
