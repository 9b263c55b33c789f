"""How much weight arrives a second."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.scheduler.esp.arrivals import REMEMBERED, Arrivals
from tests.scheduler.views import waiting


def test_nothing_is_expected_before_a_second_arrival() -> None:
    assert Arrivals().weight_per_s(5.0) == 0.0
    assert Arrivals().after([waiting("a", 0, 10)]).weight_per_s(5.0) == 0.0


def test_a_queue_that_came_at_once_says_nothing_about_what_follows() -> None:
    queue = [waiting(f"w{i}", i, 10, arrival_s=1.0) for i in range(100)]
    assert Arrivals().after(queue).weight_per_s(1.5) == 0.0


def test_weight_and_time_are_forgotten_alike() -> None:
    """By hand: 1/10 after 2 s and 1/20 after another one, and a second since."""
    kept = 1 - 1 / REMEMBERED
    queue = [waiting("a", 0, 50), waiting("b", 1, 10, arrival_s=2.0), waiting("c", 2, 20, arrival_s=3.0)]
    arrivals = Arrivals().after(queue)
    assert arrivals.weight_per_s(4.0) == pytest.approx((0.1 * kept + 0.05) / (2 * kept + 1 + 1))
    # 1 and 1 of tokens, and 10 and 20 of their squares, over the weight.
    assert arrivals.sums == (
        round((kept + 1) / (0.1 * kept + 0.05)),
        round((10 * kept + 20) / (0.1 * kept + 0.05)),
    )


def test_the_rate_of_what_came_lately_is_what_counts() -> None:
    arrivals, now_s = Arrivals(), 0.0
    for i in range(2000):
        now_s += 1.0 if i < 1000 else 0.1
        arrivals = arrivals.after([waiting(f"w{i}", i, 10, arrival_s=now_s)])
    assert arrivals.weight_per_s(now_s) == pytest.approx(0.1 / 0.1, rel=0.01)


def test_where_nobody_comes_the_rate_falls() -> None:
    arrivals = Arrivals().after([waiting("a", 0, 10), waiting("b", 1, 10, arrival_s=1.0)])
    assert arrivals.weight_per_s(1.0) == pytest.approx(0.1)
    assert arrivals.weight_per_s(100.0) == pytest.approx(0.001)


def test_who_still_waits_or_was_preempted_arrives_once() -> None:
    queue = [waiting("a", 0, 10), waiting("b", 1, 10, arrival_s=1.0)]
    arrivals = Arrivals().after(queue)
    assert arrivals.after(queue) is arrivals
    assert arrivals.after(queue[:1]) is arrivals


REQUESTS = st.lists(
    st.tuples(st.floats(0.0, 10.0), st.integers(1, 1000), st.sampled_from([-1, 0, 2])), min_size=1, max_size=20
)


@given(drawn=REQUESTS, seen_at_once=st.integers(1, 20))
def test_how_often_the_queue_is_looked_at_does_not_matter(drawn: list, seen_at_once: int) -> None:
    requests, now_s = [], 0.0
    for order, (gap_s, length, priority) in enumerate(drawn):
        now_s += gap_s
        requests.append(waiting(f"w{order}", order, length, arrival_s=now_s, priority=priority))
    in_parts = Arrivals()
    for end in range(seen_at_once, len(requests) + seen_at_once, seen_at_once):
        in_parts = in_parts.after(sorted(requests[:end], key=lambda request: (request.priority, request.order)))
    assert in_parts == Arrivals().after(requests)
    assert in_parts.weight_per_s(now_s) >= 0.0


def test_time_does_not_run_backwards_with_who_was_accepted_earlier_than_one_before() -> None:
    """By hand: two seconds from 5 to 7, in which only c was seen to come."""
    queue = [waiting("a", 0, 10, arrival_s=5.0), waiting("b", 1, 10, arrival_s=3.0), waiting("c", 2, 10, arrival_s=7.0)]
    arrivals = Arrivals().after(queue)
    assert (arrivals.seconds, arrivals.last_s) == (2.0, 7.0)
    assert arrivals.weight_per_s(7.0) == pytest.approx(0.1 / 2.0)
