"""Step 1: equations 1 and 2 by hand, and in which order requests get in."""

from __future__ import annotations

import dataclasses

import pytest

from loongjax.core.cluster import Group
from loongjax.core.plan import Decode, Plan, Prefill, PrefillRequest, SubBatch
from loongjax.core.request import FinishReason, ServiceLevel
from loongjax.costmodel.work import DecodeWork, PrefillWork
from loongjax.scheduler.esp.explain import Decision
from loongjax.scheduler.esp.objective import TOKEN_S
from loongjax.scheduler.esp.outlook import Site, loss_weight
from loongjax.scheduler.esp.times import Times
from loongjax.scheduler.observation import RequestEnded
from loongjax.scheduler.view import ClusterView, FlightView
from loongjax.scheduler.waiting import Waiting
from tests.scheduler.esp.hand_model import HandModel, ask, only, policy_of
from tests.scheduler.views import cluster, running, waiting


def prefilled(plans: tuple[Plan, ...]) -> list[str]:
    return [request.request_id for plan in plans if isinstance(plan, Prefill) for request in plan.requests]


def one_busy_instance(slo: ServiceLevel | None = None, now_s: float = 0.0) -> ClusterView:
    """Two decodes, with 4 and 5 tokens out, and a waiting prompt of 100 tokens that takes a second."""
    decodes = [running("a", 0, (0, 50), num_output_tokens=4), running("b", 1, (0, 50), num_output_tokens=5)]
    waits = [waiting("w", 2, 100, slo=slo or ServiceLevel())]
    return cluster(1, num_pages=1000, runs=decodes, waits=waits, now_s=now_s)


def test_gain_and_cost_are_those_of_equations_1_and_2() -> None:
    # Nothing is known of output lengths: a and b are half way, b has 5 steps of 2 s left, and then its group is over.
    _, decisions = ask(one_busy_instance())
    decision = only(decisions, "dispatch")
    assert decision.gain == pytest.approx(10.0 / 100)
    assert decision.cost == pytest.approx(1.0 / 8 + 1.0 / 10)
    assert (decision.instances, decision.request_ids) == ((0,), ("w",))


def test_decodes_are_paused_only_where_the_gain_exceeds_the_cost() -> None:
    plans, _ = ask(one_busy_instance(), HandModel(step_s=4.4))
    assert [type(plan) for plan in plans] == [Decode]
    plans, _ = ask(one_busy_instance(), HandModel(step_s=4.6))
    assert prefilled(plans) == ["w"]


@pytest.mark.parametrize(("arrivals_s", "due_s"), [((0.0,), 4.5), ((0.0, 2.0), 3.25), ((0.0, 1.0, 2.0), 2.5)])
def test_a_pause_that_pays_is_put_off_until_its_prompts_have_waited_for_it(
    arrivals_s: tuple[float, ...], due_s: float
) -> None:
    """0.2 s of each prefill could be shared, in which a and b would stand still for 0.225 x 0.2; a second of waiting
    costs each prompt 1 / 100."""

    def answer(now_s: float) -> tuple[tuple[Plan, ...], list[Decision]]:
        waits = [
            waiting(f"w{index}", 2 + index, 100, arrival_s=arrival_s) for index, arrival_s in enumerate(arrivals_s)
        ]
        view = dataclasses.replace(one_busy_instance(now_s=now_s), waiting=Waiting(waits))
        return ask(view, HandModel(step_s=100.0, constant_s=0.2))

    plans, decisions = answer(due_s - 0.01)
    assert only(decisions, "dispatch").is_taken
    assert only(decisions, "put-off").gain == pytest.approx((1 / 8 + 1 / 10) * 0.2)
    assert [type(plan) for plan in plans] == [Decode]
    plans, decisions = answer(due_s + 0.01)
    assert not only(decisions, "put-off").is_taken
    assert sorted(prefilled(plans)) == sorted(f"w{index}" for index in range(len(arrivals_s)))


def test_what_a_lost_second_costs_is_that_of_a_fluid_that_is_stirred() -> None:
    """As many rows come as end; in a second in which none ends as many are left behind, and all wait the longer for it
    until the number is what it was."""
    num_rows, output_len, model = 300, 200, HandModel(step_s=2.0, row_s=0.01)

    def ending_per_s(rows: float) -> float:
        return rows / (output_len * (model.step_s + model.row_s * rows))

    coming_per_s = ending_per_s(num_rows)
    rows, waited_s = num_rows + coming_per_s, 0.0
    for _ in range(30_000):
        waited_s += rows - num_rows
        rows += coming_per_s - ending_per_s(rows)
    requests = tuple([running(f"r{index}", index, (0, 1)) for index in range(num_rows)])
    site = Site(instances=(0,), requests=requests, weigh=lambda: float(num_rows))
    assert loss_weight(site, Times(model, 1)) == pytest.approx(waited_s, rel=0.01)
    assert waited_s > 2.4 * num_rows
    assert loss_weight(Site(instances=(0,)), Times(model, 1)) == 0.0


def test_a_pause_is_put_off_for_longer_the_more_of_a_step_the_rows_take() -> None:
    """Half of each step is that of one row alone, so what is lost counts twice."""
    waits = [waiting("w", 2, 100)]
    for now_s, is_put_off in ((8.9, True), (9.1, False)):
        view = dataclasses.replace(one_busy_instance(now_s=now_s), waiting=Waiting(waits))
        _, decisions = ask(view, HandModel(step_s=0.0, row_s=100.0, constant_s=0.2))
        decision = only(decisions, "put-off")
        assert decision.gain == pytest.approx(2.0 * (1 / 8 + 1 / 10) * 0.2)
        assert decision.is_taken is is_put_off


def test_no_keys_are_moved_for_whom_a_pause_is_put_off() -> None:
    runs = [running("a", 0, (0, 50), num_output_tokens=5), running("b", 1, (1, 50), num_output_tokens=5)]
    view = cluster(2, num_pages=1000, runs=runs, waits=[waiting("w", 2, 10)])
    plans, decisions = ask(view, HandModel(constant_s=0.2))
    assert {(decision.step, decision.is_taken) for decision in decisions} == {("dispatch", True), ("put-off", True)}
    assert [type(plan) for plan in plans] == [Decode, Decode]


def test_an_overdue_prompt_is_not_put_off() -> None:
    runs = [running("a", 0, (0, 50), num_output_tokens=4)]
    view = cluster(1, num_pages=1000, runs=runs, waits=[waiting("w", 1, 100)])
    assert prefilled(ask(view, HandModel(step_s=100.0, constant_s=0.2))[0]) == []
    assert prefilled(ask(view, HandModel(step_s=100.0, constant_s=0.2), max_overtakes=0)[0]) == ["w"]


def test_a_deadline_that_comes_near_weighs_in() -> None:
    model = HandModel(step_s=4.0)
    slo = ServiceLevel(ttft_s=10.0)
    plans, _ = ask(one_busy_instance(slo, now_s=0.0), model)
    assert prefilled(plans) == []
    # 7 of 10 seconds are used: 20 s weigh 10 / 3 times 0.05 / 10 each, which exceeds 0.225.
    plans, decisions = ask(one_busy_instance(slo, now_s=7.0), model)
    assert prefilled(plans) == ["w"]
    assert only(decisions, "dispatch").gain == pytest.approx(20.0 * TOKEN_S / 10 * 10 / 3)


def test_who_would_not_have_to_wait_long_gains_little() -> None:
    """A prefill of another group ends in half a second and leaves an instance without keys."""
    decodes = [running("a", 0, (0, 50), num_output_tokens=4)]
    plan = Prefill(Group.of([1]), (PrefillRequest("echo", ()),))
    flight = FlightView(plan=plan, group=plan.group, work=PrefillWork(new_lens=(50,)), started_s=0.0)
    view = cluster(2, num_pages=1000, runs=decodes, waits=[waiting("w", 2, 100)], prefilling=[1], flights=[flight])
    plans, decisions = ask(view, HandModel(step_s=100.0))
    assert only(decisions, "dispatch").gain == pytest.approx(0.5 / 100)
    assert [type(plan) for plan in plans] == [Decode]


def test_the_expected_end_of_decodes_follows_what_outputs_were_like() -> None:
    policy = policy_of(HandModel(step_s=1.0), decisions := [])
    policy.observe(
        [
            RequestEnded(num_prompt_tokens=9, num_output_tokens=length, finish_reason=FinishReason.STOP)
            for length in (2, 100, 300)
        ]
    )
    policy.plan(one_busy_instance())
    # Of outputs longer than 4 or 5 the mean is 200: a has 196 left, b 195.
    assert only(decisions, "dispatch").gain == pytest.approx(196 / 100)


def test_vacant_instances_cost_nothing() -> None:
    view = cluster(
        2, num_pages=1000, runs=[running("a", 0, (0, 50), num_output_tokens=1)], waits=[waiting("w", 1, 100)]
    )
    plans, decisions = ask(view)
    assert {type(plan): plan.group for plan in plans if isinstance(plan, Prefill | Decode)} == {
        Prefill: Group.of([1]),
        Decode: Group.of([0]),
    }
    assert not [decision for decision in decisions if decision.step == "dispatch"]


def test_what_does_not_fit_is_overtaken_a_bounded_number_of_times() -> None:
    runs = [running("a", 0, (0, 4), num_output_tokens=4)]
    policy = policy_of(HandModel(), max_overtakes=1)
    for attempt in range(3):
        # The first needs more tokens than two instances take in one prefill; a holds the third. The others take less
        # than it would, but more than half.
        waits = [waiting("large", 1, 230), waiting(f"small{attempt}", 2 + attempt, 150)]
        plans = policy.plan(cluster(3, num_pages=1000, runs=runs, waits=waits, max_num_batched_tokens=100))
        expected = [f"small{attempt}"] if attempt < 2 else []
        assert [name for name in prefilled(plans) if name != "large"] == expected


def test_a_suspect_is_prefilled_alone() -> None:
    waits = [waiting("s", 0, 8, is_suspect=True), waiting("w", 1, 8)]
    plans, _ = ask(cluster(1, waits=waits))
    assert prefilled(plans) == ["s"]
    plans, _ = ask(cluster(1, waits=waits[::-1]))
    assert "s" not in prefilled(plans)[1:]


def test_nobody_joins_a_suspect_when_decodes_are_paused_for_more_instances() -> None:
    """The second is so urgent that the decodes would be paused for it, and one prefill on both were best."""
    runs = [running("a", 5, (0, 50), num_output_tokens=10**6)]
    waits = [waiting("s", 6, 10, is_suspect=True), waiting("w", 7, 1000, priority=-10)]
    old = running("old", 0, (2, 8), is_in_flight=True, num_output_tokens=10**6)
    view = cluster(3, num_pages=1000, runs=[*runs, old], waits=waits, prefilling=[2])
    assert prefilled(ask(view, HandModel(moved_s=1e9))[0]) == ["s"]


def test_the_oldest_request_is_prefilled_whatever_it_costs_once_it_was_overtaken_enough() -> None:
    runs = [running("young", 1, (0, 380), num_output_tokens=1), running("younger", 2, (1, 300), num_output_tokens=1)]
    view = cluster(2, runs=runs, waits=[waiting("old", 0, 390)])
    plans, decisions = ask(view, max_overtakes=0)
    assert prefilled(plans) == ["old"]
    assert only(decisions, "senior").is_taken
    # As long as it may still be overtaken, it waits for what runs to end.
    assert prefilled(ask(view)[0]) == []


@pytest.mark.parametrize("max_overtakes", [16, 0])
def test_decodes_that_let_enough_prefills_pass_come_first(max_overtakes: int) -> None:
    """Also before requests that may be overtaken no more."""
    policy = policy_of(HandModel(step_s=1e6), max_prefills_before_decode=2, max_overtakes=max_overtakes)
    answers = []
    for attempt in range(4):
        runs = [running("a", 0, (0, 50), num_output_tokens=4)]
        waits = [waiting(f"w{attempt}", 1 + attempt, 10)]
        answers.append(prefilled(policy.plan(cluster(1, num_pages=1000, runs=runs, waits=waits))))
    assert answers == [["w0"], ["w1"], [], ["w3"]]


def test_decodes_that_stand_still_while_a_prefill_waits_for_others_cost_that_wait_too() -> None:
    """An instance computes one of the prompts at a time, in a second. The step on 0 ends in a second, so that w0 is
    done after two and w1 could follow it there. On 1, which is idle, it could start after one:

        gain = 1 / 100 x (2 - 1), and cost = 1 / 140 x (1 + 1), of which the wait is one half.
    """
    plan = Decode(Group.of([0]), (SubBatch(0, ("a",)),))
    step = FlightView(plan=plan, group=plan.group, work=DecodeWork(rows=(1,), keys=(51,)), started_s=0.0)
    view = cluster(
        2,
        num_pages=1000,
        runs=[
            running("a", 0, (0, 51), num_output_tokens=100, is_in_flight=True),
            running("b", 1, (1, 50), num_output_tokens=70),
        ],
        waits=[waiting("w0", 2, 100), waiting("w1", 3, 100)],
        max_num_batched_tokens=100,
        decoding=[0],
        flights=[step],
        now_s=1.0,
    )
    plans, decisions = ask(view, HandModel(moved_s=1e9))
    first, second = [decision for decision in decisions if decision.step == "dispatch"]
    assert (first.instances, first.is_taken) == ((0,), True)
    assert (second.instances, second.is_taken) == ((1,), False)
    assert second.gain == pytest.approx(1 / 100)
    assert second.cost == pytest.approx(2 / 140)
    assert plans == (Decode(Group.of([1]), (SubBatch(1, ("b",)),)),)


def test_a_group_that_recovers_from_a_failure_is_no_place_for_prefills() -> None:
    """Nobody knows how long that takes. The first two groups do, and are cheapest to pause; the third one is looked at
    nevertheless."""
    runs = [
        running(f"r{instance}", instance, (instance, 50), num_output_tokens=100 - instance) for instance in range(3)
    ]
    flights = [FlightView(plan=None, group=Group.of([instance]), work=None, started_s=0.0) for instance in (0, 1)]
    view = cluster(3, num_pages=1000, runs=runs, waits=[waiting("w", 3, 100)], decoding=[0, 1], flights=flights)
    plans, decisions = ask(view, HandModel(moved_s=1e9))
    assert {decision.instances for decision in decisions if decision.step == "dispatch"} == {(2,)}
    assert prefilled(plans) == ["w"]
