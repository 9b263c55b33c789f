"""Which of a long queue are looked at."""

from __future__ import annotations

import math
import operator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.core.plan import Plan, Prefill
from loongjax.core.request import ServiceLevel
from loongjax.scheduler.esp import candidates as module
from loongjax.scheduler.esp.candidates import Candidates
from loongjax.scheduler.waiting import Waiting
from tests.scheduler.esp.hand_model import HandModel, ask
from tests.scheduler.views import cluster, running, waiting

length_of = operator.attrgetter("num_tokens")
MODEL = HandModel(constant_s=1e-6, moved_s=1e9)


def prefilled(plans: tuple[Plan, ...]) -> list[str]:
    return [request.request_id for plan in plans if isinstance(plan, Prefill) for request in plan.requests]


def test_a_short_prompt_behind_a_long_queue_is_seen() -> None:
    runs = [running("old", 0, (0, 4), num_output_tokens=1, is_in_flight=True)]
    queue = [*[waiting(f"long{i}", 1 + i, 5000) for i in range(300)], waiting("short", 999, 10)]
    plans, _ = ask(cluster(2, num_pages=9999, runs=runs, waits=queue, decoding=[0]), MODEL)
    assert prefilled(plans) == ["short"]


def test_of_equally_short_prompts_the_most_urgent_is_seen() -> None:
    runs = [running("old", 0, (0, 4), num_output_tokens=1, is_in_flight=True)]
    queue = [waiting("urgent", 500, 900, priority=-1), *[waiting(f"w{i}", 1 + i, 1000) for i in range(300)]]
    plans, _ = ask(cluster(2, num_pages=9999, runs=runs, waits=queue, decoding=[0]), MODEL, max_picked=4)
    assert prefilled(plans)[0] == "urgent"


def test_the_first_of_the_queue_is_seen_however_long_it_is() -> None:
    runs = [running("old", 0, (0, 4), num_output_tokens=1, is_in_flight=True)]
    queue = [waiting("long", 1, 5000), *[waiting(f"short{i}", 2 + i, 10) for i in range(300)]]
    view = cluster(2, num_pages=9999, runs=runs, waits=queue, decoding=[0])
    assert prefilled(ask(view, MODEL, max_overtakes=0)[0])[0] == "long"
    assert "long" not in prefilled(ask(view, MODEL)[0])


@given(lens=st.lists(st.integers(1, 50), min_size=1, max_size=30), count=st.integers(1, 12))
def test_the_first_and_the_shortest_of_the_others_are_looked_at_in_the_order_of_the_queue(
    lens: list[int], count: int
) -> None:
    queue = Waiting([waiting(f"w{i}", i, length) for i, length in enumerate(lens)])
    found = Candidates(count, math.inf).of(queue)
    assert found[0] is queue[0]
    assert [request.order for request in found] == sorted({request.order for request in found})
    assert [request.num_tokens for request in sorted(found[1:], key=length_of)] == sorted(lens[1:])[: count - 1]
    assert found.table.tolist() == Waiting(found).table.tolist()


def test_a_queue_that_has_changed_is_looked_at_again() -> None:
    candidates = Candidates(2, math.inf)
    queue = Waiting([waiting("a", 0, 9), waiting("b", 1, 8), waiting("c", 2, 7)])
    assert candidates.of(queue) == (queue[0], queue[2])
    assert candidates.of(queue) is candidates.of(queue)
    shorter = Waiting([*queue, waiting("d", 3, 1)])
    assert candidates.of(shorter) == (shorter[0], shorter[3])
    assert candidates.of(Waiting(queue[:2])) == queue[:2]


def test_candidates_stay_the_same_while_longer_ones_come_behind_them() -> None:
    candidates = Candidates(2, math.inf)
    queue = Waiting([waiting("a", 0, 9), waiting("b", 1, 8), waiting("c", 2, 7)])
    found = candidates.of(queue)
    assert candidates.of(Waiting([*queue, waiting("d", 3, 10)])) is found
    assert candidates.of(Waiting([*queue, waiting("e", 4, 6)])) is not found


@given(
    queues=st.lists(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([-1, 0, 0, 0, 1])), max_size=8), max_size=5),
    most=st.sampled_from([3, 6, 1024]),
)
def test_a_queue_that_grows_and_shrinks_is_looked_at_as_if_it_were_new(
    queues: list[list[tuple[int, int]]], most: int
) -> None:
    """Equal pairs of (which request, priority) are equal requests, so many queues begin alike."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_SEEN", most)
        candidates = Candidates(2, math.inf)
        for queue in queues:
            waits = Waiting([waiting(f"w{order}", order, 1 + 7 * order % 5, priority=p) for order, p in queue])
            assert candidates.of(waits) == Candidates(2, math.inf).of(Waiting(waits))


def test_what_candidates_weigh_is_worked_out_again_once_time_or_patience_changes_it() -> None:
    view, later = cluster(1, num_pages=9, now_s=1.0), cluster(1, num_pages=9, now_s=2.0)
    calm, hurried = Waiting([waiting("a", 0, 9)]), Waiting([waiting("a", 0, 9, slo=ServiceLevel(ttft_s=4.0))])
    candidates = Candidates(2, math.inf)
    first = candidates.window_of(calm, view, is_patient=True)
    assert candidates.window_of(calm, later, is_patient=True) is first
    assert not candidates.window_of(calm, later, is_patient=False).is_patient
    urgent = candidates.window_of(hurried, view, is_patient=True)
    assert candidates.window_of(hurried, view, is_patient=True) is urgent
    # A quarter of the time is used up, then a half.
    assert candidates.window_of(hurried, later, is_patient=True).weights[0] == urgent.weights[0] * 0.75 / 0.5
