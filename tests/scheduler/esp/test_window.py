"""What is known of a window's first requests is what adding them up one by one gives."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from loongjax.core.cluster import ClusterShape
from loongjax.scheduler.esp.sizes import Sizes
from loongjax.scheduler.esp.window import Window
from loongjax.scheduler.waiting import Waiting
from tests.scheduler.views import waiting

SHAPE = ClusterShape(num_instances=1, num_pages=100, page_size=4)
REQUESTS = st.lists(st.tuples(st.integers(1, 40), st.booleans(), st.integers(0, 9)), min_size=1, max_size=8)


def window_of(requests: list[tuple[int, bool, int]], *, is_patient: bool = True) -> Window:
    """Of (tokens, whether keys are kept, 0 if it is suspect)."""
    views = Waiting(
        [
            waiting(f"w{order}", order, length, keeps_kv=keeps, is_suspect=suspect == 0)
            for order, (length, keeps, suspect) in enumerate(requests)
        ]
    )
    return Window(Sizes(views, SHAPE, math.inf), 0.0, is_patient=is_patient)


@given(
    requests=REQUESTS,
    is_patient=st.booleans(),
    limits=st.tuples(st.integers(-5, 150), st.integers(-5, 40), st.integers(-5, 600)),
)
def test_the_first_that_fit_together(
    requests: list[tuple[int, bool, int]], is_patient: bool, limits: tuple[int, int, int]
) -> None:
    window = window_of(requests, is_patient=is_patient)
    number = min(window.num_first_within(*limits[:2]), window.num_first_of_most(limits[2]))

    def fits(count: int) -> bool:
        some = window.order[:count]
        taken = [sum(numbers[place] for place in some) for numbers in (window.lens, window.pages, window.sizes.most)]
        return all(map(int.__le__, taken, limits)) and not any(window[place].is_suspect for place in some)

    if number:
        assert fits(number)
    assert number == len(requests) or not fits(number + 1)


@given(requests=REQUESTS, data=st.data())
def test_sums_grow_with_each_request_whether_they_are_the_first_ones_or_not(
    requests: list[tuple[int, bool, int]], data: st.DataObject
) -> None:
    window = window_of(requests)
    for places in (window.order, window.order[:2], data.draw(st.permutations(range(len(requests))))):
        lens = [window.lens[place] for place in places]
        weights = [window.weights[place] for place in places]
        expected = [list(itertools.accumulate(row)) for row in (lens, [length**2 for length in lens], weights)]
        assert window.growing(list(places)).tolist() == expected


@given(requests=REQUESTS, data=st.data())
def test_what_requests_take_is_told_of_those_that_are_asked_about(
    requests: list[tuple[int, bool, int]], data: st.DataObject
) -> None:
    window = window_of(requests)
    some = st.lists(st.integers(0, len(requests) - 1), max_size=3)
    for places in data.draw(st.lists(some, max_size=5)):
        slots = [SHAPE.page_size * window.pages[place] for place in places]
        expected = [[numbers[place] for place in places] for numbers in (window.lens, window.weights)]
        loads = window.loads(places)
        assert [loads[0].tolist(), loads[2].tolist(), loads[3].tolist()] == [*expected, slots]
        assert loads[1].tolist() == [length**2 for length in expected[0]]
        places.clear()  # nobody but the caller owns the list


@given(requests=REQUESTS)
def test_longest_first_and_among_equals_the_first_of_the_queue(requests: list[tuple[int, bool, int]]) -> None:
    window = window_of(requests)
    places = window.order[::2]
    expected = sorted(places, key=lambda place: (-window.lens[place], place))
    assert window.longest_first(places) == expected
    lens, squares, weights, slots = window.loads(expected).tolist()
    assert lens == [window.lens[place] for place in expected]
    assert squares == [window.lens[place] ** 2 for place in expected]
    assert weights == [window.weights[place] for place in expected]
    assert slots == [SHAPE.page_size * window.pages[place] for place in expected]
