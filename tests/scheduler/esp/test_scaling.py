"""Step 4: masters join where computing takes the time, and keys are moved where that saves more than it takes."""

from __future__ import annotations

import pytest

from loongjax.core.cluster import Group
from loongjax.core.plan import Decode, Migrate, Plan, Preempt, Prefill
from loongjax.scheduler.view import ClusterView
from tests.scheduler.esp.hand_model import HandModel, ask, only
from tests.scheduler.views import cluster, running, waiting

COMPUTE_BOUND = HandModel(row_s=1.0, moved_s=0.001)


def eight_on_one(num_output_tokens: int = 10) -> ClusterView:
    runs = [running(f"r{i}", i, (0, 20), num_output_tokens=num_output_tokens) for i in range(8)]
    return cluster(2, num_pages=1000, runs=runs)


def rows(plans: tuple[Plan, ...]) -> dict[int, int]:
    (plan,) = [plan for plan in plans if isinstance(plan, Decode)]
    return {batch.master: len(batch.request_ids) for batch in plan.sub_batches}


def test_masters_share_the_requests_evenly_where_computing_bounds_the_step() -> None:
    plans, decisions = ask(eight_on_one(), COMPUTE_BOUND)
    decision = only(decisions, "scale-up")
    # 10 steps are expected, each 8 rows long or 4; then 10 x 4 keys have to come back.
    assert decision.gain == pytest.approx(10 * (8.0 - 4.0))
    assert decision.cost == pytest.approx(10 * 4 * 0.001)
    assert rows(plans) == {0: 4, 1: 4}


def test_one_master_does_where_reading_the_weights_bounds_the_step() -> None:
    assert rows(ask(eight_on_one(), HandModel(row_s=0.0))[0]) == {0: 8}


def test_no_master_joins_whose_keys_would_take_longer_to_come_back() -> None:
    assert rows(ask(eight_on_one(), HandModel(row_s=1.0, moved_s=1.1))[0]) == {0: 8}


def test_scale_up_can_be_switched_off() -> None:
    assert rows(ask(eight_on_one(), COMPUTE_BOUND, scale_up=False)[0]) == {0: 8}


def test_an_answer_is_the_same_a_step_later() -> None:
    """Or the engine could never submit a step before the last one is read."""
    runs = [running(f"r{i}", i, (0, 20), num_output_tokens=10) for i in range(8)]
    (first,) = ask(cluster(2, num_pages=1000, runs=runs), COMPUTE_BOUND)[0]
    assert isinstance(first, Decode)
    masters = {name: batch.master for batch in first.sub_batches for name in batch.request_ids}
    after = [
        running(f"r{i}", i, (0, 21), num_output_tokens=11)
        if not masters[f"r{i}"]
        else running(f"r{i}", i, (0, 20), (1, 1), num_output_tokens=11)
        for i in range(8)
    ]
    (second,) = ask(cluster(2, num_pages=1000, runs=after), COMPUTE_BOUND)[0]
    assert second == first


def full(num_vacant: int) -> ClusterView:
    """Three requests whose next tokens have no page on their instance."""
    runs = [running(f"r{i}", i, (0, 4), num_output_tokens=2) for i in range(3)]
    return cluster(1 + num_vacant, num_pages=3, runs=runs)


def test_a_group_without_pages_takes_in_an_instance() -> None:
    (plan,) = ask(full(num_vacant=1), growth_tokens=0)[0]
    assert isinstance(plan, Decode)
    assert plan.group == Group.of([0, 1])
    assert plan.masters == (1,)


def test_a_group_without_pages_gives_up_its_newest_requests_if_it_may_take_in_none() -> None:
    plans, _ = ask(full(num_vacant=1), growth_tokens=0, scale_up=False)
    assert plans[0] == Preempt(("r2", "r1"))
    assert isinstance(plans[1], Decode)
    assert plans[1].group == Group.of([0])


def straddling() -> ClusterView:
    runs = [running("a", 0, (1, 8), (0, 40), num_output_tokens=10), running("b", 1, (0, 40), num_output_tokens=10)]
    return cluster(2, num_pages=1000, runs=runs)


def test_a_few_keys_are_moved_so_that_a_group_can_do_with_fewer_instances() -> None:
    plans, decisions = ask(straddling(), HandModel(exchange_s=0.1, moved_s=0.01))
    taken = [decision for decision in decisions if decision.is_taken]
    assert [decision.step for decision in taken] == ["scale-down"]
    assert taken[0].gain == pytest.approx(10 * 0.1)
    assert taken[0].cost == pytest.approx(8 * 0.01)
    assert plans == (Migrate("a", 1, 0, 8),)


def test_keys_are_not_moved_for_less_than_that_takes() -> None:
    (plan,) = ask(straddling(), HandModel(exchange_s=0.1, moved_s=1.0))[0]
    assert isinstance(plan, Decode)


def test_the_keys_of_a_prefill_stay_on_the_fewest_instances() -> None:
    """A prompt that deserves four instances leaves its keys on one."""
    view = cluster(4, num_pages=300, waits=[waiting("w", 0, 1000)])
    (plan,) = ask(view)[0]
    assert isinstance(plan, Prefill)
    assert plan.group.dop == 4
    assert len({interval.instance for request in plan.requests for interval in request.kept}) == 1


def test_no_master_joins_while_requests_wait_that_the_instance_could_go_to() -> None:
    """There is no room yet for the one that waits: 1,750 pages, of which 1,000 are free on 1 and at most 460 on 0."""
    runs = [running(f"r{i}", i, (0, 20), num_output_tokens=10) for i in range(8)]
    waits = [waiting("w", 8, 7000)]
    for requests, expected in ((waits, {0: 8}), ([], {0: 4, 1: 4})):
        view = cluster(2, num_pages=1000, runs=runs, waits=requests, taken={0: 500})
        assert rows(ask(view, COMPUTE_BOUND)[0]) == expected


@pytest.mark.parametrize(("key_s", "is_worth"), [(0.005, True), (0.01, False)])
def test_keys_that_are_moved_have_to_be_read_where_the_others_are(key_s: float, is_worth: bool) -> None:
    """Of a 8 keys lie on 1. A step on 0 alone saves the exchange, but reads 88 keys there, not 80."""
    plans, decisions = ask(straddling(), HandModel(exchange_s=0.1, key_s=key_s, moved_s=0.06))
    decision = only(decisions, "scale-down")
    assert decision.gain == pytest.approx(10 * (0.1 - 8 * key_s))
    assert decision.cost == pytest.approx(8 * 0.06)
    assert [type(plan) for plan in plans] == [Migrate if is_worth else Decode]
