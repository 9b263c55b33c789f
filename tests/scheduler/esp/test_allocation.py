"""Step 2: equations 3 and 4 by hand."""

from __future__ import annotations

import pytest

from loongjax.core.cluster import Group
from loongjax.core.plan import Decode, Migrate, Prefill, PrefillRequest, SubBatch
from loongjax.costmodel.work import DecodeWork, PrefillWork
from loongjax.scheduler.view import ClusterView, FlightView
from tests.scheduler.esp.hand_model import HandModel, ask, only
from tests.scheduler.views import cluster, running, waiting


def three_instances(num_output_tokens: int = 10) -> ClusterView:
    """Nobody on 0, 40 keys on 1, 80 on 2, and a prompt of 1,000 tokens: 10 s on one instance, 5 s on two."""
    return cluster(
        3,
        num_pages=300,
        runs=[
            running("d", 0, (1, 40), num_output_tokens=num_output_tokens),
            running("e", 1, (2, 80), num_output_tokens=10),
        ],
        waits=[waiting("w", 2, 1000)],
    )


def test_keys_are_moved_away_where_the_prefill_gains_more_than_that_takes() -> None:
    plans, decisions = ask(three_instances())
    decision = only(decisions, "migrate")
    assert decision.gain == pytest.approx((10.0 - 5.0) / 1000)  # equation 3
    assert decision.cost == pytest.approx((1 / 1000 + 1 / 20) * 40 * 0.0001)  # equation 4, and d stands still
    # Instance 0 waits for instance 1, and 2 takes over what it has.
    assert plans == (Migrate("d", 1, 2, 40),)


def test_once_the_keys_are_moved_the_prefill_has_both_instances() -> None:
    runs = [running("d", 0, (2, 40), num_output_tokens=10), running("e", 1, (2, 80), num_output_tokens=10)]
    plans, _ = ask(cluster(3, num_pages=300, runs=runs, waits=[waiting("w", 2, 1000)]), HandModel(moved_s=1.0))
    assert {type(plan): plan.group for plan in plans if isinstance(plan, Prefill | Decode)} == {
        Prefill: Group.of([0, 1]),
        Decode: Group.of([2]),
    }


def test_keys_stay_where_moving_them_takes_longer_than_the_prefill_gains() -> None:
    plans, decisions = ask(three_instances(), HandModel(moved_s=0.01))
    assert not [decision for decision in decisions if decision.is_taken and decision.step == "migrate"]
    groups = {plan.group for plan in plans if isinstance(plan, Prefill)}
    assert groups == {Group.of([0])}


def test_decodes_are_paused_for_more_instances_where_that_costs_least() -> None:
    """d has so many tokens, and may have a thousand more, that 5 s more do not matter to it."""
    plans, decisions = ask(three_instances(num_output_tokens=2000), HandModel(moved_s=1.0))
    decision = next(decision for decision in decisions if decision.step == "allocate")
    assert decision.gain == pytest.approx(5.0 / 1000)
    assert decision.cost == pytest.approx(5.0 / 3000)
    assert {plan.group for plan in plans if isinstance(plan, Prefill)} == {Group.of([0, 1])}


@pytest.mark.parametrize(("left_s", "waits"), [(1.0, True), (4.9, True), (5.1, False)])
def test_idle_instances_wait_for_one_that_a_prefill_leaves_soon(left_s: float, waits: bool) -> None:
    """Alone 10 s from now; together 5 s after the other one is free."""
    plan = Prefill(Group.of([1]), (PrefillRequest("echo", ()),))
    flight = FlightView(plan=plan, group=plan.group, work=PrefillWork(new_lens=(1000,)), started_s=0.0)
    view = cluster(
        2, num_pages=300, waits=[waiting("w", 0, 1000)], prefilling=[1], flights=[flight], now_s=10.0 - left_s
    )
    plans, decisions = ask(view)
    assert only(decisions, "wait").is_taken == waits
    assert [type(plan) for plan in plans] == ([] if waits else [Prefill])


def test_what_takes_longer_than_predicted_is_not_waited_for_in_vain() -> None:
    """It is 89 s late, so it may be late by as much again."""
    plan = Prefill(Group.of([1]), (PrefillRequest("echo", ()),))
    flight = FlightView(plan=plan, group=plan.group, work=PrefillWork(new_lens=(1000,)), started_s=0.0)
    view = cluster(2, num_pages=300, waits=[waiting("w", 0, 1000)], prefilling=[1], flights=[flight], now_s=99.0)
    _, decisions = ask(view)
    wait = only(decisions, "wait")
    assert dict(wait.terms)["ready_s"] == 89.0
    assert not wait.is_taken


def test_a_target_has_room_for_all_that_is_moved() -> None:
    view = cluster(
        3,
        num_pages=300,
        runs=[running("d", 0, (1, 40), num_output_tokens=10), running("e", 1, (2, 80), num_output_tokens=10)],
        waits=[waiting("w", 2, 1000)],
        taken={1: 285, 2: 272},
    )
    plans, _ = ask(view)
    assert not [plan for plan in plans if isinstance(plan, Migrate)]


def test_decodes_that_are_paused_stand_still_while_the_prefill_waits_for_another_to_end() -> None:
    """w weighs 1 / 1000, a 1 / 3000. Without 1 it takes 10 s; with it 5 s, 4 s from now: w gains 1 s, a loses 4."""
    plan = Prefill(Group.of([1]), (PrefillRequest("echo", ()),))
    flight = FlightView(plan=plan, group=plan.group, work=PrefillWork(new_lens=(1000,)), started_s=0.0)
    view = cluster(
        2,
        num_pages=1000,
        runs=[running("a", 0, (0, 50), num_output_tokens=2000, max_new_tokens=1000)],
        waits=[waiting("w", 1, 1000)],
        prefilling=[1],
        flights=[flight],
        now_s=6.0,
    )
    plans, decisions = ask(view)
    assert only(decisions, "dispatch").is_taken
    decision = only(decisions, "wait")
    assert decision.gain == pytest.approx((10.0 - 4.0 - 5.0) / 1000)
    assert decision.cost == pytest.approx(4.0 / 3000)
    assert not decision.is_taken
    assert [plan.group for plan in plans if isinstance(plan, Prefill)] == [Group.of([0])]


def test_decodes_that_would_be_paused_before_the_others_are_ready_cost_that_wait_too() -> None:
    """The step on 0 ends in 1 s. On 0 and 1 the prompt would then take 5 s instead of 10, and b would stand still for
    all of 6 s."""
    plan = Decode(Group.of([0]), (SubBatch(0, ("a",)),))
    step = FlightView(plan=plan, group=plan.group, work=DecodeWork(rows=(1,), keys=(51,)), started_s=0.0)
    view = cluster(
        2,
        num_pages=1000,
        runs=[
            running("a", 0, (0, 51), num_output_tokens=2000, is_in_flight=True),
            running("b", 1, (1, 50), num_output_tokens=550),
        ],
        waits=[waiting("w", 2, 1000)],
        decoding=[0],
        flights=[step],
        now_s=1.0,
    )
    plans, decisions = ask(view, HandModel(moved_s=1e9))
    decision = only(decisions, "allocate")
    assert decision.gain == pytest.approx((1.0 + 10.0 - 1.0 - 5.0) / 1000)
    assert decision.cost == pytest.approx((1.0 + 5.0) / 1100)
    assert not decision.is_taken
    assert plans == (Decode(Group.of([1]), (SubBatch(1, ("b",)),)),)
