"""Facts of decode groups: by their definitions, and never of a group as it was before."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.core.request import ServiceLevel
from loongjax.scheduler.components import Component
from loongjax.scheduler.esp.groups import GroupFacts, GroupMemory
from loongjax.scheduler.esp.objective import decode_weights, step_weights
from loongjax.scheduler.esp.output_lengths import OutputLengths
from loongjax.scheduler.request_view import RunningView
from loongjax.scheduler.running import Running
from tests.scheduler.views import running


def learned(*outputs: int) -> OutputLengths:
    lengths = OutputLengths()
    for length in outputs:
        lengths.add(length)
    return lengths


def pair() -> list[RunningView]:
    return [
        running("a", 0, (0, 30), (2, 11), num_output_tokens=4, max_new_tokens=50),
        running("b", 1, (2, 8), num_output_tokens=2, max_new_tokens=3),
    ]


def facts(requests: Sequence[RunningView], lengths: OutputLengths) -> GroupFacts:
    return GroupMemory().facts_of(Component({2, 0}, Running(requests)), lengths)


def test_a_group_by_hand() -> None:
    group = facts(pair(), learned(10, 20))
    assert group.instances == (0, 2)
    assert group.num_keys == {0: 30, 2: 11 + 8}
    assert group.size_of_step == (2, 2, 25)
    # a is expected to get 15 tokens, 11 more than it has; b has no more than 3 left.
    assert group.num_steps_left == 11.0
    assert group.weight_of_steps(5.0, 0.1) == pytest.approx((6 / 10 + 16 / 20) / 2 + 3 / 5)
    assert group.pause_weight(5.0, 0.1) == pytest.approx((1 / 10 + 1 / 20) / 2 + 1 / 5)


def test_what_has_not_changed_is_not_worked_out_again() -> None:
    memory, lengths, requests = GroupMemory(), learned(10), pair()
    first = memory.facts_of(Component({0, 2}, Running(requests)), lengths)
    assert memory.facts_of(Component({0, 2}, Running(requests)), lengths.copy()) is first


@pytest.mark.parametrize("change", ["a token more", "one fewer", "one more", "another instance", "an output ended"])
def test_whatever_changes_is_seen(change: str) -> None:
    memory, lengths, requests, instances = GroupMemory(), learned(10), pair(), {0, 2}
    first = memory.facts_of(Component(set(instances), Running(requests)), lengths)
    match change:
        case "a token more":
            requests[1] = requests[1]._replace(kv=((2, 9),), num_tokens=9, num_output_tokens=3)
        case "one fewer":
            del requests[0]
        case "one more":
            requests.append(running("c", 2, (0, 5), num_output_tokens=1))
        case "another instance":
            instances.add(1)
        case "an output ended":
            lengths.add(500)
    again = memory.facts_of(Component(instances, Running(requests)), lengths)
    fresh = (
        facts(requests, lengths) if change != "another instance" else GroupFacts((0, 1, 2), Running(requests), lengths)
    )
    assert again is not first
    assert again.num_steps_left == fresh.num_steps_left
    assert again.size_of_step == fresh.size_of_step
    assert again.pause_weight(1.0, 0.1) == fresh.pause_weight(1.0, 0.1)


def test_a_weight_with_a_pace_in_it_follows_the_clock_and_others_do_not() -> None:
    hurried = Running([pair()[1]._replace(slo=ServiceLevel(tpot_s=0.5), first_token_s=0.0)])
    group = facts(hurried, learned(5))
    for now_s in (0.0, 1.0, 2.0):
        assert group.pause_weight(now_s, 0.1) == sum(decode_weights(hurried, now_s, learned(5), 0.1))
        assert group.weight_of_steps(now_s, 0.1) == sum(step_weights(hurried, now_s, learned(5), 0.1))
    assert group.pause_weight(0.0, 0.1) != group.pause_weight(1.0, 0.1)
    assert group.weight_of_steps(0.0, 0.1) != group.weight_of_steps(1.0, 0.1)
    calm = facts(pair(), learned(5))
    assert calm.pause_weight(0.0, 0.1) == calm.pause_weight(9.0, 0.3)
    assert calm.weight_of_steps(0.0, 0.1) == calm.weight_of_steps(9.0, 0.3)


CHANGES = st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["grow", "end", "come", "learn"])), max_size=20)


@given(changes=CHANGES, weighs_together=st.booleans())
def test_a_memory_of_many_groups_answers_as_one_of_none(changes: list[tuple[int, str]], weighs_together: bool) -> None:
    memory, lengths = GroupMemory(), OutputLengths()
    groups = {
        instance: [running(f"{instance}", instance, (instance, 5), num_output_tokens=1, priority=instance // 3)]
        for instance in range(4)
    }
    for number, (instance, change) in enumerate(changes):
        requests = groups[instance]
        match change:
            case "grow" if requests:
                ((_, held),) = requests[0].kv
                requests[0] = requests[0]._replace(
                    num_tokens=held + 1,
                    kv=((instance, held + 1),),
                    num_output_tokens=requests[0].num_output_tokens + 1,
                )
            case "end" if requests:
                del requests[0]
            case "come":
                requests.append(running(f"n{number}", 10 + number, (instance, 3), num_output_tokens=1))
            case "learn":
                lengths.add(number + 1)
        known_of = {
            place: memory.facts_of(Component({place}, Running(company)), lengths)
            for place, company in groups.items()
            if company
        }
        if weighs_together:
            memory.weigh(list(known_of.values()))
        for place, company in groups.items():
            if company:
                known = known_of[place]
                fresh = GroupFacts((place,), Running(company), lengths)
                assert known.requests == fresh.requests
                assert known.num_keys == fresh.num_keys
                assert known.weight_of_steps(0.0, 0.0) == fresh.weight_of_steps(0.0, 0.0)
                assert known.pause_weight(0.0, 0.0) == fresh.pause_weight(0.0, 0.0)


def test_what_a_pause_or_a_longer_step_costs_is_weighed_by_the_time_a_token_that_is_implied() -> None:
    lengths, requests = learned(10), Running(pair())
    usual, patient = (
        GroupMemory(implied_tpot_s).facts_of(Component({0, 2}, requests), lengths) for implied_tpot_s in (0.05, 0.2)
    )
    assert patient.pause_weight(1.0, 0.1) == pytest.approx(usual.pause_weight(1.0, 0.1) / 4)
    assert patient.weight_of_steps(1.0, 0.1) == pytest.approx(usual.weight_of_steps(1.0, 0.1) / 4)
