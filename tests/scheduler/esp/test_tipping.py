"""The tipping point by hand, and of several batches at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.core.cluster import ClusterShape
from loongjax.scheduler.esp.dispatch import Choice
from loongjax.scheduler.esp.outlook import Site
from loongjax.scheduler.esp.sizes import Sizes
from loongjax.scheduler.esp.times import Times
from loongjax.scheduler.esp.tipping import Line, put_in_order, tipping_points
from loongjax.scheduler.esp.window import Window
from loongjax.scheduler.waiting import Waiting
from tests.scheduler.esp.hand_model import HandModel
from tests.scheduler.views import running, waiting


def line_of(lens: list[int], loss_weight: float = 0.0) -> Line:
    return Line(lens, [1.0 / length for length in lens], loss_weight)


def tipping_point(model: HandModel, lens: list[int], loss_weight: float = 0.0) -> int:
    (point,) = tipping_points(Times(model, 1), 1, [line_of(lens, loss_weight)])
    return point.number


@pytest.mark.parametrize(("num_requests", "expected"), [(1, 1), (2, 2), (3, 2), (10, 6), (100, 51)])
def test_beyond_the_tipping_point_a_batch_grows_with_the_queue(num_requests: int, expected: int) -> None:
    """Each request takes as long as the constant: the k-th delays k - 1, which is worth it for all those behind."""
    # By hand: r joins while 1 s x (r - 1) <= 1.01 s x (n - r + 1).
    by_hand = max(r for r in range(1, num_requests + 1) if (r - 1) <= 1.01 * (num_requests - r + 1))
    assert tipping_point(HandModel(constant_s=1.0), [100] * num_requests) == expected == by_hand


def test_a_prefill_that_is_bound_by_memory_takes_everybody() -> None:
    assert tipping_point(HandModel(floor_s=10.0), [10] * 50) == 50


def test_a_long_prompt_is_not_batched_with_a_short_one_that_it_would_delay() -> None:
    assert tipping_point(HandModel(constant_s=1.0), [10, 10_000]) == 1


def test_decodes_that_stand_still_for_each_prefill_make_batches_larger() -> None:
    """The second prompt takes 2 s more, which costs the first 0.2; another prefill costs 1 s x (1 / 200 + the decodes'
    weight)."""
    model = HandModel(constant_s=1.0)
    assert [tipping_point(model, [10, 200], weight) for weight in (0.0, 0.19, 0.2)] == [1, 1, 2]


@given(lines=st.lists(st.lists(st.integers(1, 3000), min_size=1, max_size=6), min_size=1, max_size=5))
def test_lines_that_are_asked_about_together_do_not_know_of_each_other(lines: list[list[int]]) -> None:
    model = HandModel(constant_s=1.0, squared_token_s=1e-5)
    times = Times(model, 1)
    together = tipping_points(times, 1, [line_of(lens, 0.01) for lens in lines])
    assert [point.number for point in together] == [tipping_point(model, lens, 0.01) for lens in lines]
    for point, lens in zip(together, lines, strict=True):
        requests = [waiting(f"w{order}", order, length) for order, length in enumerate(lens)]
        assert point.seconds == times.batch_s(1, requests[: point.number])
        assert point.whole_s == times.batch_s(1, requests)


def test_the_batches_of_a_choice_are_put_in_order_and_each_counts_the_decodes_of_its_own_group() -> None:
    """Each is the case above: 10 and 200 tokens, of which the second starts only where decodes stand still."""
    lens = [200, 10, 10, 200]
    requests = [waiting(f"w{order}", order, length) for order, length in enumerate(lens)]
    shape = ClusterShape(num_instances=3, num_pages=100, page_size=16)
    decodes = (running("a", 0, (0, 50)), running("b", 1, (1, 50)))
    sites = [Site(instances=(0, 1), requests=decodes, weigh=lambda: 0.2), Site(instances=(2,))]
    choice = Choice([0, 1, 2, 3], [0, 1, 2], sites)
    times = Times(HandModel(constant_s=1.0), 1)
    for is_patient, second in ((True, [2, 3]), (False, [2, 3])):
        window = Window(Sizes(Waiting(requests), shape, float("inf")), 0.0, is_patient=is_patient)
        split = [([0, 1], [0]), ([3, 2], [2])]
        batches = put_in_order(split, choice, window, times, starting={0, 1, 2})
        first = [1, 0] if is_patient else [0, 1]
        assert [batch.places for batch in batches] == [first, second]
        assert [batch.starting for batch in batches] == [first, second[:1]]
        assert [batch.group for batch in batches] == [[0], [2]]
        later = put_in_order(split, choice, window, times, starting={0})
        assert [batch.starting for batch in later] == [first, []]
        assert later[1].places == [3, 2]
