"""Freeing an instance by moving its keys: what is moved where, and what that costs those who decode on."""

from __future__ import annotations

import pytest

from loongjax.core.plan import Decode, Migrate
from loongjax.core.request import FinishReason
from loongjax.scheduler.esp.objective import TOKEN_S
from loongjax.scheduler.observation import RequestEnded
from loongjax.scheduler.view import ClusterView
from tests.scheduler.esp.hand_model import HandModel, ask, only, policy_of
from tests.scheduler.views import cluster, running, waiting


def two_groups(num_output_tokens: int = 10) -> ClusterView:
    """40 keys on 0, 80 on 1; a prompt that nobody pauses for, because so much has been generated so little."""
    return cluster(
        2,
        num_pages=1000,
        runs=[
            running("d", 0, (0, 40), num_output_tokens=num_output_tokens),
            running("e", 1, (1, 80), num_output_tokens=num_output_tokens),
        ],
        waits=[waiting("w", 2, 1000)],
    )


def test_where_pausing_does_not_pay_an_instance_is_freed_by_moving_its_keys() -> None:
    plans, decisions = ask(two_groups())
    assert not [decision for decision in decisions if decision.step == "dispatch" and decision.is_taken]
    decision = only(decisions, "migrate")
    moved_s = 40 * 0.0001
    # 10 more steps of 2 s are expected, after which d would be over by itself.
    assert decision.gain == pytest.approx((10 * 2.0 - moved_s) / 1000)
    assert decision.cost == pytest.approx((1 / 1000 + 1 / 20) * moved_s)
    assert plans == (Migrate("d", 0, 1, 40),)


def test_longer_steps_of_those_who_decode_together_count_against_moving() -> None:
    """Both are half way; a step with both takes 2.2 s, with one 2.1 s."""
    _, decisions = ask(two_groups(), HandModel(row_s=0.1))
    decision = next(decision for decision in decisions if decision.step == "migrate")
    assert dict(decision.terms)["slowdown_weight_s"] == pytest.approx(0.1 * 0.5 + 0.1 * 0.5)
    assert decision.cost == pytest.approx((1 / 1000 + 1 / 20) * 40 * 0.0001 + 0.1)
    assert not decision.is_taken


def test_who_is_nearly_done_minds_longer_steps_less() -> None:
    policy = policy_of(HandModel(row_s=0.1), decisions := [])
    # All outputs had 11 tokens, of which one is left.
    end = RequestEnded(num_prompt_tokens=9, num_output_tokens=11, finish_reason=FinishReason.STOP)
    policy.observe([end] * 20)
    policy.plan(two_groups())
    decision = next(decision for decision in decisions if decision.step == "migrate")
    assert dict(decision.terms)["slowdown_weight_s"] == pytest.approx(2 * 0.1 / 11)


def test_longer_steps_cost_those_little_who_are_allowed_much() -> None:
    """The less a pause of decodes weighs, the less do longer steps."""
    _, decisions = ask(two_groups(), HandModel(row_s=0.1), implied_tpot_s=10 * TOKEN_S)
    decision = next(decision for decision in decisions if decision.step == "migrate")
    assert dict(decision.terms)["slowdown_weight_s"] == pytest.approx((0.1 * 0.5 + 0.1 * 0.5) / 10)
    assert decision.is_taken


def test_an_instance_of_a_larger_group_is_freed_into_the_group() -> None:
    """a lies on 0 and 1, with few keys on 1: those go to 0, where the rest is."""
    plans, _ = ask(larger_group())
    assert plans[0] == Migrate("a", 1, 0, 12)


def test_a_group_that_loses_an_instance_reads_its_keys_on_those_that_are_left() -> None:
    """812 keys on two instances, or on one; a and b are half way."""
    _, decisions = ask(larger_group(1400), HandModel(key_s=0.001))
    decision = next(decision for decision in decisions if decision.step == "migrate")
    assert decision.instances == (0, 1)
    assert dict(decision.terms)["slowdown_weight_s"] == pytest.approx((0.5 + 0.5) * (0.812 - 0.406))


def larger_group(num_tokens: int = 1000) -> ClusterView:
    return cluster(
        3,
        num_pages=1000,
        runs=[
            running("a", 0, (1, 12), (0, 400), num_output_tokens=50),
            running("b", 1, (0, 400), num_output_tokens=50),
            running("c", 2, (2, 40), num_output_tokens=50),
        ],
        waits=[waiting("w", 3, num_tokens)],
    )


def test_keys_of_a_request_that_has_just_been_moved_stay() -> None:
    policy = policy_of(HandModel())
    assert isinstance(policy.plan(two_groups())[0], Migrate)
    assert [type(plan) for plan in policy.plan(two_groups())] == [Migrate]
    assert {type(plan) for plan in policy.plan(two_groups())} == {Decode}


def test_nothing_decodes_on_either_instance_until_the_move_is_over() -> None:
    view = cluster(
        2,
        num_pages=1000,
        runs=[
            running("d", 0, (0, 40), num_output_tokens=10),
            running("d2", 1, (0, 40), num_output_tokens=10),
            running("e", 2, (1, 200), num_output_tokens=10, is_in_flight=True),
        ],
        waits=[waiting("w", 3, 1000)],
        decoding=[1],
    )
    assert ask(view)[0] == ()


@pytest.mark.parametrize(("max_num_seqs", "is_moved"), [(2, False), (3, True)])
def test_a_target_has_a_seat_for_everybody_who_comes(max_num_seqs: int, is_moved: bool) -> None:
    """d would be the third on 1."""
    runs = [running(name, order, (order > 0, 40), num_output_tokens=10) for order, name in enumerate("def")]
    view = cluster(2, num_pages=1000, runs=runs, waits=[waiting("w", 3, 1000)], max_num_seqs=max_num_seqs)
    plans, _ = ask(view)
    assert [plan for plan in plans if isinstance(plan, Migrate)] == ([Migrate("d", 0, 1, 40)] if is_moved else [])
