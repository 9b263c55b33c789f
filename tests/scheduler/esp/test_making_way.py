"""Who gets instances when none is vacant: short prompts for a moment, and whoever was overtaken enough, somehow."""

from __future__ import annotations

import pytest

from loongjax.core.cluster import Group
from loongjax.core.plan import Decode, Migrate, Plan, Prefill, PrefillRequest
from loongjax.costmodel.work import PrefillWork
from loongjax.scheduler.view import ClusterView, FlightView
from tests.scheduler.esp.hand_model import HandModel, ask, only, policy_of
from tests.scheduler.views import cluster, running, waiting


def prefilled(plans: tuple[Plan, ...]) -> list[str]:
    return [request.request_id for plan in plans if isinstance(plan, Prefill) for request in plan.requests]


def beside_a_prefill(num_output_tokens: int = 10) -> ClusterView:
    """A decode on 0; 1 is being prefilled for 20 s. A prompt of 10 s waits, and one of 0.1 s behind it."""
    flight = FlightView(
        plan=Prefill(Group.of([1]), (PrefillRequest("old", ()),)),
        group=Group.of([1]),
        work=PrefillWork(new_lens=(2000,)),
        started_s=0.0,
    )
    return cluster(
        2,
        num_pages=2000,
        runs=[
            running("old", 0, (1, 2000), is_in_flight=True),
            running("d", 1, (0, 40), num_output_tokens=num_output_tokens),
        ],
        waits=[waiting("long", 2, 1000), waiting("short", 3, 10)],
        prefilling=[1],
        flights=[flight],
    )


def two_groups() -> ClusterView:
    """40 keys on 0, 80 on 1, and a prompt that nobody gains from pausing for."""
    runs = [running("d", 0, (0, 40), num_output_tokens=10), running("e", 1, (1, 80), num_output_tokens=10)]
    return cluster(2, num_pages=1000, runs=runs, waits=[waiting("w", 2, 1000)])


def test_decodes_are_paused_for_the_short_prompts_alone_if_a_long_one_would_take_too_long() -> None:
    """A pause for both takes 50.1 s, for the short one 0.1 s, which saves it 20 s."""
    runs = [running("a", 0, (0, 50), num_output_tokens=10)]
    waits = [waiting("long", 1, 5000), waiting("short", 2, 10)]
    plans, decisions = ask(cluster(1, num_pages=9999, runs=runs, waits=waits))
    assert prefilled(plans) == ["short"]
    decision = only(decisions, "dispatch")
    assert decision.request_ids == ("short",)
    assert decision.gain == pytest.approx(10 * 2.0 / 10)
    assert decision.cost == pytest.approx(0.1 / 20)


def test_who_was_overtaken_enough_gets_an_instance_whose_keys_are_moved() -> None:
    """Two steps of 2.1 s become one of 2.2 s, which costs 0.1; a pause of 10 s costs 10 / 20."""
    model = HandModel(row_s=0.1)
    plans, decisions = ask(two_groups(), model, max_overtakes=0)
    assert plans == (Migrate("d", 0, 1, 40),)
    decision = only(decisions, "migrate")
    assert decision.gain == pytest.approx(10.0 / 20)
    assert decision.cost == pytest.approx((1 / 1000 + 1 / 20) * 40 * 0.0001 + 0.1)


def test_for_such_a_one_keys_move_that_have_just_been_moved() -> None:
    policy = policy_of(HandModel(), max_overtakes=0)
    assert [policy.plan(two_groups()) for _ in range(3)] == [(Migrate("d", 0, 1, 40),)] * 3


def test_it_waits_for_a_prefill_that_leaves_its_keys_to_be_moved_to_and_nobody_starts_before_it() -> None:
    """20 s of waiting cost it 20 / 1,000, a pause of 10 s costs the decode 10 / 20."""
    plans, decisions = ask(beside_a_prefill(), max_overtakes=0)
    assert [type(plan) for plan in plans] == [Decode]
    decision = only(decisions, "wait")
    assert (decision.gain, decision.cost) == (pytest.approx(10.0 / 20), pytest.approx(20.0 / 1000))


def test_it_does_not_wait_where_a_pause_costs_less() -> None:
    plans, decisions = ask(beside_a_prefill(num_output_tokens=2000), max_overtakes=0)
    assert prefilled(plans) == ["long"]
    assert not only(decisions, "wait").is_taken


def test_an_instance_with_keys_of_a_request_that_stands_still_is_not_vacant() -> None:
    """Half of a request's keys are on an instance that is being prefilled; if another prefill took the other half's
    instance, and so on in turn, it would stand still for long."""
    flight = FlightView(
        plan=Prefill(Group.of([1]), (PrefillRequest("old", ()),)),
        group=Group.of([1]),
        work=PrefillWork(new_lens=(100,)),
        started_s=0.0,
    )
    runs = [running("old", 0, (1, 100), is_in_flight=True), running("torn", 1, (1, 40), (0, 40), num_output_tokens=5)]
    view = cluster(2, num_pages=1000, runs=runs, waits=[waiting("w", 2, 1000)], prefilling=[1], flights=[flight])
    assert ask(view)[0] == ()
