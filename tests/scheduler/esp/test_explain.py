"""Why decisions are made can be reckoned again from what is told of them, and what is acted on is told apart."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import get_args

import pytest

from loongjax.core.cluster import Group
from loongjax.core.plan import Prefill, PrefillRequest
from loongjax.costmodel.work import PrefillWork
from loongjax.scheduler.esp.explain import Decision, JsonLines, Rehearsal, Step
from loongjax.scheduler.esp.policy import EspPolicy
from loongjax.scheduler.policy import ExplainedPolicy, PredictingPolicy
from loongjax.scheduler.view import ClusterView, FlightView
from tests.scheduler.esp.explained import check_terms
from tests.scheduler.esp.hand_model import HandModel, ask, only, policy_of
from tests.scheduler.views import cluster, running, waiting

LONG = waiting("w", 5, 1000)


def prefilling(instance: int, num_tokens: int) -> FlightView:
    plan = Prefill(Group.of([instance]), (PrefillRequest("echo", ()),))
    return FlightView(plan=plan, group=plan.group, work=PrefillWork(new_lens=(num_tokens,)), started_s=0.0)


def two_decodes(num_vacant: int = 0, *, num_output_tokens: int = 10) -> ClusterView:
    """On the first instances behind vacant ones; a prompt of 10 s waits."""
    runs = [
        running(f"r{index}", index, (num_vacant + index, 40 + 40 * index), num_output_tokens=num_output_tokens)
        for index in range(2)
    ]
    return cluster(num_vacant + 2, num_pages=300, runs=runs, waits=[LONG])


def beside_a_prefill(*decoding: int, num_tokens: int) -> ClusterView:
    """Another one runs on 1, and nothing on 0 unless it decodes."""
    runs = [running(f"r{instance}", instance, (instance, 40), num_output_tokens=10) for instance in decoding]
    return cluster(
        2, num_pages=300, runs=runs, waits=[LONG], prefilling=[1], flights=[prefilling(1, num_tokens)], now_s=0.5
    )


def full_of_decodes() -> ClusterView:
    """Two of them, and a prompt that neither leaves room for."""
    runs = [running(f"r{i}", i, (i, 224), num_output_tokens=50, max_new_tokens=50) for i in range(2)]
    return cluster(2, num_pages=100, runs=runs, waits=[waiting("w", 2, 192, max_total_tokens=196)])


def on_two_instances(*kv: tuple[int, int]) -> ClusterView:
    runs = [running("a", 0, *kv, num_output_tokens=10)]
    return cluster(
        2, num_pages=1000, runs=[*runs, *[running(f"b{i}", 1 + i, (0, 40), num_output_tokens=10) for i in range(7)]]
    )


def forced() -> ClusterView:
    """The oldest request of all has room only if others lose theirs."""
    runs = [running("young", 1, (0, 380), num_output_tokens=1), running("younger", 2, (1, 300), num_output_tokens=1)]
    return cluster(2, runs=runs, waits=[waiting("old", 0, 390)])


Scene = tuple[Step, Callable[[], ClusterView], HandModel, dict[str, object]]
SCENES: list[Scene] = [
    ("dispatch", two_decodes, HandModel(moved_s=1e9), {}),
    ("put-off", two_decodes, HandModel(step_s=1e4, constant_s=1.0), {}),
    ("tie", full_of_decodes, HandModel(step_s=1.0, row_s=0.2), {}),
    ("allocate", lambda: two_decodes(1, num_output_tokens=2000), HandModel(moved_s=1.0), {}),
    ("migrate", lambda: two_decodes(1), HandModel(row_s=0.0001), {}),
    ("migrate", two_decodes, HandModel(row_s=0.0001), {}),
    ("migrate", two_decodes, HandModel(row_s=0.1), {"max_overtakes": 0}),
    ("wait", lambda: beside_a_prefill(num_tokens=300), HandModel(), {}),
    ("wait", lambda: beside_a_prefill(0, num_tokens=2000), HandModel(), {"max_overtakes": 0}),
    ("batch", lambda: cluster(4, num_pages=300, waits=[LONG]), HandModel(), {}),
    ("senior", forced, HandModel(), {"max_overtakes": 0}),
    ("scale-up", lambda: on_two_instances((0, 20)), HandModel(row_s=1.0, moved_s=0.001), {}),
    ("scale-down", lambda: on_two_instances((1, 8), (0, 40)), HandModel(exchange_s=0.1, moved_s=0.01), {}),
]


@pytest.mark.parametrize(("step", "view", "model", "settings"), SCENES)
def test_gain_and_cost_can_be_reckoned_from_the_terms(
    step: Step, view: Callable[[], ClusterView], model: HandModel, settings: dict[str, object]
) -> None:
    _, decisions = ask(view(), model, **settings)
    assert step in [decision.step for decision in decisions]
    for decision in decisions:
        check_terms(decision)


def who_saw_short_ones(decisions: list[Decision], **settings: object) -> EspPolicy:
    policy = policy_of(HandModel(moved_s=1e9), decisions, **settings)
    for second in range(101):
        short = waiting(f"short{second}", second, 10, arrival_s=float(second))
        policy.plan(cluster(4, num_pages=2000, waits=[short], now_s=float(second)))
    decisions.clear()
    return policy


@pytest.mark.parametrize("scene", ["an instance less pays", "it costs too much", "the only one is held"])
def test_what_is_spared_can_be_reckoned_from_the_terms(scene: str) -> None:
    policy = who_saw_short_ones(decisions := [])
    late = dataclasses.replace(LONG, order=999, num_tokens=4000, max_total_tokens=4100, arrival_s=100.0)
    if scene == "it costs too much":
        late = dataclasses.replace(late, num_tokens=40)
    view = cluster(4, num_pages=2000, waits=[late], now_s=100.0)
    if scene == "the only one is held":
        flight = dataclasses.replace(prefilling(1, 1000), started_s=95.0)
        view = cluster(2, num_pages=2000, waits=[late], prefilling=[1], flights=[flight], now_s=100.0)
    policy.plan(view)
    decision = only(decisions, "spare")
    check_terms(decision)
    assert decision.is_taken is (scene != "it costs too much")
    assert ("wait_s" in dict(decision.terms)) is (scene == "the only one is held")


def test_every_kind_of_step_is_reckoned_here() -> None:
    assert {step for step, *_ in SCENES} | {"spare"} == set(get_args(Step))


def test_the_three_ways_to_move_and_the_two_ways_to_wait_are_told_apart() -> None:
    told: dict[str, set[tuple[bool, bool]]] = {"migrate": set(), "wait": set()}
    for step, view, model, settings in SCENES:
        for decision in ask(view(), model, **settings)[1]:
            if step == decision.step and step in told:
                names = dict(decision.terms)
                told[step].add(("ready_s" in names, "wait_otherwise_s" in names))
    assert told == {
        "migrate": {(True, False), (False, True), (False, False)},
        "wait": {(True, False), (False, False)},
    }


def test_what_a_copy_decides_is_marked_and_told_again_when_it_is_followed() -> None:
    policy = policy_of(HandModel(moved_s=1e9), decisions := [])
    assert isinstance(policy, ExplainedPolicy)
    assert isinstance(policy, PredictingPolicy)
    copy = policy.copy()
    copy.plan(two_decodes())
    rehearsed = list(decisions)
    assert [decision.is_rehearsal for decision in rehearsed] == [True] * len(rehearsed) != []
    copy.note_followed()
    told_again = decisions[len(rehearsed) :]
    assert [dataclasses.replace(decision, is_rehearsal=True) for decision in told_again] == rehearsed
    assert not any(decision.is_rehearsal for decision in told_again)
    decisions.clear()
    copy.plan(two_decodes())
    copy.note_followed()
    assert decisions == told_again, "it is no rehearsal any more, and tells nothing twice"


def test_a_copy_of_a_copy_tells_only_what_it_has_decided_itself() -> None:
    policy = policy_of(HandModel(moved_s=1e9), decisions := [])
    first = policy.copy()
    first.plan(two_decodes())
    second = first.copy()
    decisions.clear()
    second.plan(two_decodes())
    second.note_followed()
    assert [decision.is_rehearsal for decision in decisions] == [True] * (len(decisions) // 2) + [False] * (
        len(decisions) // 2
    )


def test_rehearsals_are_marked_in_the_file(tmp_path: pathlib.Path) -> None:
    lines = JsonLines(tmp_path / "why.jsonl")
    rehearsal = Rehearsal(lines)
    rehearsal(Decision(now_s=1.0, step="senior", is_taken=True, gain=0.0, cost=0.0, instances=()))
    rehearsal.follow()
    lines.close()
    told = [json.loads(line) for line in (tmp_path / "why.jsonl").read_text().splitlines()]
    assert [line["is_rehearsal"] for line in told] == [True, False]
