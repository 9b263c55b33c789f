"""What the policy as a whole does that the reference does not: several batches, no barrier, learning, explaining."""

from __future__ import annotations

import json
import math
import pathlib

import pytest

from loongjax.core.cluster import ClusterShape, Group
from loongjax.core.plan import Decode, Prefill, PrefillRequest, SubBatch
from loongjax.costmodel.work import DecodeWork, PrefillWork, Strategy
from loongjax.errors import ConfigError
from loongjax.scheduler.esp.config import EspConfig
from loongjax.scheduler.esp.explain import JsonLines
from loongjax.scheduler.esp.policy import EspPolicy
from loongjax.scheduler.observation import IterationEnded
from loongjax.scheduler.policy import Policy
from loongjax.scheduler.view import ClusterView, FlightView
from tests.scheduler.esp.hand_model import HandModel, ask, only, policy_of
from tests.scheduler.toy_engine import ToyEngine
from tests.scheduler.views import cluster, running, waiting

LONG_AND_SHORT = [waiting("long", 0, 3000), *[waiting(f"short{i}", 1 + i, 10) for i in range(4)]]


def test_it_is_a_policy() -> None:
    assert isinstance(policy_of(HandModel()), Policy)


def test_short_prompts_do_not_share_a_prefill_with_a_long_one() -> None:
    """The reference never forms more than one prefill batch."""
    plans, _ = ask(cluster(4, num_pages=1000, waits=LONG_AND_SHORT))
    groups = {
        plan.group: [request.request_id for request in plan.requests] for plan in plans if isinstance(plan, Prefill)
    }
    assert ["long"] in groups.values()
    assert len(groups) > 1


def test_a_request_that_arrives_during_a_long_prefill_starts_at_once() -> None:
    """The reference admits nobody until the longest prefill of its macro iteration is over."""
    plan = Prefill(Group.of([0, 1, 2]), ())
    flight = FlightView(plan=plan, group=plan.group, work=PrefillWork(new_lens=(10**6,)), started_s=0.0)
    runs = [running("long", 0, (0, 3000), is_in_flight=True)]
    waits = [waiting("short", 1, 10)]
    view = cluster(4, num_pages=3000, runs=runs, waits=waits, prefilling=[0, 1, 2], flights=[flight], now_s=1.0)
    (short,) = ask(view)[0]
    assert isinstance(short, Prefill)
    assert short.group == Group.of([3])


def test_decodes_go_on_beside_a_prefill_on_other_instances() -> None:
    runs = [running("a", 0, (0, 400), num_output_tokens=1)]
    plans, _ = ask(cluster(4, num_pages=1000, runs=runs, waits=[waiting("w", 1, 2000)]), HandModel(moved_s=1.0))
    assert {type(plan): plan.group for plan in plans if isinstance(plan, Prefill | Decode)} == {
        Prefill: Group.of([1, 2, 3]),
        Decode: Group.of([0]),
    }


def test_idle_instances_are_held_for_decodes_that_end_their_step_soon() -> None:
    """The prompt needs all three instances; two of them are in a step, so nothing starts on the third meanwhile."""
    runs = [running(f"r{i}", 1 + i, (i, 8), is_in_flight=i > 0, num_output_tokens=3) for i in range(3)]
    flights = []
    for i in (1, 2):
        plan = Decode(Group.of([i]), (SubBatch(i, (f"r{i}",)),))
        work = DecodeWork(rows=(1,), keys=(9,))
        flights.append(FlightView(plan=plan, group=plan.group, work=work, started_s=0.0))
    waits = [waiting("w", 0, 250, max_total_tokens=260)]
    view = cluster(
        3, num_pages=500, runs=runs, waits=waits, decoding=[1, 2], flights=flights, max_num_batched_tokens=100
    )
    assert ask(view, max_overtakes=0)[0] == ()
    idle = cluster(
        3,
        num_pages=500,
        runs=[running(f"r{i}", 1 + i, (i, 9), num_output_tokens=4) for i in range(3)],
        waits=waits,
        max_num_batched_tokens=100,
    )
    (prefill,) = ask(idle, max_overtakes=0)[0]
    assert isinstance(prefill, Prefill)
    assert prefill.group == Group.of([0, 1, 2])


def test_nothing_is_planned_for_a_cluster_that_is_busy() -> None:
    assert ask(cluster(1, waits=[waiting("w", 0, 5)], prefilling=[0]))[0] == ()


def test_times_are_corrected_by_what_iterations_take() -> None:
    """A prefill that takes longer than predicted costs the decodes that it pauses more."""

    def cost(policy: EspPolicy, decisions: list) -> float:
        decisions.clear()
        runs = [running("a", 0, (0, 50), num_output_tokens=4)]
        policy.plan(cluster(1, num_pages=1000, runs=runs, waits=[waiting("w", 1, 100)]))
        return only(decisions, "dispatch").cost

    policy = policy_of(HandModel(), decisions := [])
    before = cost(policy, decisions)
    ended = IterationEnded(
        plan=Prefill(Group.of([0]), ()), strategy=Strategy(1, 1), work=PrefillWork(new_lens=(100,)), elapsed_s=2.0
    )
    policy.observe([ended] * 200)
    assert cost(policy, decisions) == pytest.approx(2.0 * before, rel=0.01)


def test_a_copy_that_is_asked_for_nothing_leaves_no_trace() -> None:
    """Neither in who was overtaken, nor in who let prefills pass."""
    policy = policy_of(HandModel(step_s=1e6), max_prefills_before_decode=1)
    runs = [running("a", 0, (0, 50), num_output_tokens=4)]

    def view() -> ClusterView:
        return cluster(1, num_pages=1000, runs=runs, waits=[waiting("w", 1, 10)])

    for _ in range(3):
        assert isinstance(policy.copy().plan(view())[0], Prefill)
    assert isinstance(policy.plan(view())[0], Prefill)
    assert isinstance(policy.plan(view())[0], Decode)


def test_a_copy_does_not_learn_what_the_other_is_told() -> None:
    runs = [running("a", 0, (0, 50), num_output_tokens=4)]
    view = cluster(1, num_pages=1000, runs=runs, waits=[waiting("w", 1, 100)])
    policy = policy_of(HandModel(step_s=20.0))
    other = policy.copy()
    assert isinstance(other.plan(view)[0], Prefill)
    ended = IterationEnded(
        plan=Prefill(Group.of([0]), ()), strategy=Strategy(1, 1), work=PrefillWork(new_lens=(100,)), elapsed_s=8.0
    )
    policy.observe([ended] * 200)
    assert isinstance(policy.plan(view)[0], Decode)
    assert isinstance(other.copy().plan(view)[0], Prefill)


def test_decodes_go_on_while_a_prompt_waits_for_a_long_prefill_to_end() -> None:
    """It wants their instance too, but not before the other one is free."""
    plan = Prefill(Group.of([1]), (PrefillRequest("echo", ()),))
    runs = [running("a", 1, (0, 50), num_output_tokens=10**6)]
    waits = [waiting("w", 0, 1000)]
    answers = []
    for num_tokens in (400, 40):
        flight = FlightView(plan=plan, group=plan.group, work=PrefillWork(new_lens=(num_tokens,)), started_s=0.0)
        view = cluster(2, num_pages=1000, runs=runs, waits=waits, prefilling=[1], flights=[flight])
        plans, decisions = ask(view, HandModel(step_s=0.3, moved_s=1e9))
        assert only(decisions, "wait").is_taken
        answers.append([type(plan) for plan in plans])
    assert answers == [[Decode], []]


def test_without_migration_times_no_keys_are_moved() -> None:
    class NoMigration(HandModel):
        def migration_s(self, num_tokens: int | float, tp: int) -> float:
            raise ConfigError("not measured")

    shape = ClusterShape(num_instances=3, num_pages=8, page_size=4)
    engine = ToyEngine(EspPolicy(EspConfig(growth_tokens=2), NoMigration()), shape)
    for _ in range(6):
        engine.add(20, 12)
    engine.run()
    assert {type(plan).__name__ for plan in engine.history} <= {"Prefill", "Decode", "Preempt"}


def test_every_decision_can_be_read_as_a_json_line(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "decisions.jsonl"
    sink = JsonLines(path)
    policy = EspPolicy(EspConfig(implied_ttft_s=math.inf, implied_tpot_s=0.05), HandModel(), explain=sink)
    runs = [running("a", 0, (0, 50), num_output_tokens=4), running("b", 1, (0, 50), num_output_tokens=5)]
    policy.plan(cluster(1, num_pages=1000, runs=runs, waits=[waiting("w", 2, 100)], now_s=7.0))
    sink.close()
    (decision,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert decision["step"] == "dispatch"
    assert decision["now_s"] == 7.0
    assert decision["gain"] == pytest.approx(0.1)
    assert decision["cost"] == pytest.approx(0.225)
    assert decision["instances"] == [0]
    assert decision["request_ids"] == ["w"]
    assert decision["is_taken"] is False
    assert decision["terms"]["prefill_s"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_picked": 0},
        {"max_overtakes": -1},
        {"implied_ttft_s": 0.0},
        {"implied_ttft_s": math.nan},
        {"implied_tpot_s": 0.0},
        {"max_prefills_before_decode": 0},
    ],
)
def test_a_setting_that_cannot_work_is_refused(bad: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        EspConfig(**bad)
