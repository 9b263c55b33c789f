"""What starts of a batch, what follows it, and for how long a long prompt may be put off."""

from __future__ import annotations

import pytest

from loongjax.core.cluster import Group
from loongjax.core.plan import Decode, Prefill, PrefillRequest
from loongjax.costmodel.work import PrefillWork
from loongjax.scheduler.request_view import RunningView, WaitingView
from loongjax.scheduler.view import ClusterView, FlightView
from tests.scheduler.esp.hand_model import HandModel, ask, only, policy_of
from tests.scheduler.views import cluster, running, waiting

LONG = waiting("long", 5, 2000)
SHORT = waiting("short", 6, 10)


def prefills(plans: tuple) -> list[list[str]]:
    return [[request.request_id for request in plan.requests] for plan in plans if isinstance(plan, Prefill)]


def view_of(*waits: WaitingView, others: tuple[RunningView, ...] = ()) -> ClusterView:
    """Two instances; an old request is being prefilled on one of them."""
    flight = FlightView(
        plan=Prefill(Group.of([1]), (PrefillRequest("old", ()),)),
        group=Group.of([1]),
        work=PrefillWork(new_lens=(4000,)),
        started_s=0.0,
    )
    runs = [running("old", 0, (1, 4000), is_in_flight=True), *others]
    return cluster(2, num_pages=2000, runs=runs, waits=waits, prefilling=[1], flights=[flight])


@pytest.mark.parametrize("waits", [(LONG, SHORT), (waiting("short", 1, 10), LONG)])
def test_a_short_prompt_does_not_share_the_only_free_instance_with_a_long_one(waits: tuple[WaitingView, ...]) -> None:
    """Together both would wait 20.1 s; one after the other the short one waits 0.1 s, and the long one no longer."""
    plans, decisions = ask(view_of(*waits), HandModel(moved_s=1e9))
    assert prefills(plans) == [["short"]]
    assert dict(only(decisions, "batch").terms)["num_put_off"] == 1.0


def test_prompts_of_one_length_start_in_order_of_arrival() -> None:
    waits = [waiting(f"w{i}", i + 1, 100) for i in range(10)]
    (started,) = prefills(ask(view_of(*waits), HandModel(constant_s=1.0, moved_s=1e9))[0])
    assert started == [f"w{i}" for i in range(len(started))]
    assert 1 < len(started) < 10


def test_priority_goes_before_length() -> None:
    urgent = waiting("long", 5, 2000, priority=-20)
    assert prefills(ask(view_of(urgent, SHORT), HandModel(moved_s=1e9))[0]) == [["long"]]


@pytest.mark.parametrize(
    ("max_overtakes", "short_len", "num_put_off"), [(0, 10, 0), (1, 10, 16), (3, 10, 48), (1, 500, 4), (3, 1000, 6)]
)
def test_a_long_prompt_is_put_off_for_a_bounded_multiple_of_its_own_time(
    max_overtakes: int, short_len: int, num_put_off: int
) -> None:
    """Who goes first counts by what it takes, of what the long prompt would take, but a sixteenth at least."""
    policy = policy_of(HandModel(moved_s=1e9), max_overtakes=max_overtakes)
    for i in range(num_put_off):
        assert prefills(policy.plan(view_of(LONG, waiting(f"short{i}", 6 + i, short_len)))) == [[f"short{i}"]]
    assert prefills(policy.plan(view_of(LONG, waiting("last", 999, short_len))))[0][0] == "long"


def test_the_oldest_of_all_is_put_off_for_a_short_prompt_too_and_nobody_is_paused_for_it() -> None:
    """Decodes are on the other instance: the long prompt starts right after the short one, without their place."""
    runs = [running("a", 9, (1, 400), num_output_tokens=1)]
    waits = [waiting("long", 0, 2000), waiting("short", 1, 10)]
    plans, _ = ask(cluster(2, num_pages=2000, runs=runs, waits=waits), HandModel(constant_s=1.0, moved_s=1e9))
    assert prefills(plans) == [["short"]]
    assert [plan.group for plan in plans if isinstance(plan, Decode)] == [Group.of([1])]


def test_who_was_overtaken_enough_is_not_made_to_wait_for_a_prefill_to_end() -> None:
    """Two instances half a second later are better for it than one now, but they might be taken again by then."""
    flight = FlightView(
        plan=Prefill(Group.of([1]), (PrefillRequest("echo", ()),)),
        group=Group.of([1]),
        work=PrefillWork(new_lens=(50,)),
        started_s=0.0,
    )
    view = cluster(2, num_pages=2000, waits=[LONG], prefilling=[1], flights=[flight])
    patient, _ = ask(view, HandModel(moved_s=1e9), max_overtakes=1)
    assert prefills(patient) == []
    urgent, _ = ask(view, HandModel(moved_s=1e9), max_overtakes=0)
    assert prefills(urgent) == [["long"]]


def test_a_request_that_an_instance_could_hold_whole_is_not_cut_over_a_group() -> None:
    """Two instances of 100 pages decode together, and have room for 60 each."""
    runs = [running("tied", 0, (0, 39 * 4), (1, 38 * 4), num_output_tokens=5, max_new_tokens=4)]

    def kept(num_pages: int) -> list[list[int]]:
        waits = [waiting("w", 1, num_pages * 4, max_total_tokens=num_pages * 4)]
        plans, _ = ask(cluster(2, runs=runs, waits=waits), HandModel(step_s=1e6, moved_s=1e9))
        requests = [request for plan in plans if isinstance(plan, Prefill) for request in plan.requests]
        return [[interval.instance for interval in request.kept] for request in requests]

    assert [len(instances) for instances in kept(60)] == [1]
    assert kept(80) == []
    assert [len(instances) for instances in kept(110)] == [2]


def test_where_memory_is_short_each_decode_group_keeps_to_the_requests_that_it_is_paused_for() -> None:
    """There is room for 50 and 34 pages. Prompts of 20, 30 and 30 fill it, but not as neighbours in order of length:
    equation 5 would put all of them on both instances.
    """
    runs = [
        running("a", 0, (0, 49 * 4), num_output_tokens=5, max_new_tokens=4),
        running("b", 1, (1, 32 * 4), num_output_tokens=5, max_new_tokens=4),
        running("c", 2, (1, 32 * 4), num_output_tokens=5, max_new_tokens=4),
    ]
    waits = [
        waiting(f"w{order}", order, num_pages * 4, max_total_tokens=num_pages * 4)
        for order, num_pages in ((3, 30), (4, 20), (5, 30))
    ]
    view = cluster(2, runs=runs, waits=waits, now_s=100.0)
    plans, _ = ask(view, HandModel(step_s=1e6, constant_s=1.0, token_s=0.001, moved_s=1e9))
    groups = [plan.group for plan in plans if isinstance(plan, Prefill)]
    started = {group: sorted(names) for group, names in zip(groups, prefills(plans), strict=True)}
    assert started == {Group.of([0]): ["w3", "w4"], Group.of([1]): ["w5"]}


def test_the_oldest_request_gets_the_pages_that_others_were_promised_where_it_needs_them() -> None:
    """8 pages are free on each instance, of which the decodes may want one each; it needs all 16."""
    runs = [running(f"r{order}", order, (order - 1, 8), num_output_tokens=1) for order in (1, 2)]
    view = cluster(2, num_pages=10, runs=runs, waits=[waiting("old", 0, 64, max_total_tokens=68)])
    (plan,) = ask(view, max_overtakes=0)[0]
    assert isinstance(plan, Prefill)
    (request,) = plan.requests
    assert {(interval.instance, interval.end - interval.begin) for interval in request.kept} == {(0, 32), (1, 32)}
