"""Equation 5 for a choice, and asked again on fewer instances, against asking anew."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.scheduler.draft import Draft
from loongjax.scheduler.esp.batching import SplitMemory
from loongjax.scheduler.esp.sizes import Sizes
from loongjax.scheduler.esp.splitter import Splitter
from loongjax.scheduler.esp.times import Times
from loongjax.scheduler.esp.window import Window
from loongjax.scheduler.view import ClusterView
from tests.scheduler.esp.hand_model import HandModel
from tests.scheduler.views import cluster, waiting


def splitter_of(view: ClusterView) -> Splitter:
    window = Window(Sizes(view.waiting, view.shape, math.inf), view.now_s, is_patient=True)
    return Splitter(Draft(view, 0), window, Times(HandModel(constant_s=0.1), 1), SplitMemory())


@settings(max_examples=100, deadline=None)
@given(
    lens=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    num_pages=st.sampled_from([20, 60, 1000]),
    fewer=st.sets(st.integers(0, 3), min_size=1),
)
def test_the_same_requests_on_fewer_instances_are_split_as_if_there_were_no_others(
    lens: list[int], num_pages: int, fewer: set[int]
) -> None:
    waits = [waiting(f"w{order}", order, length) for order, length in enumerate(lens)]
    view = cluster(4, num_pages=num_pages, waits=waits)
    splitter = splitter_of(view)
    batches = splitter.split(list(range(len(lens))), [0, 1, 2, 3])
    places = [place for batch, _ in batches for place in batch]
    if not places:
        return
    again, anew = splitter.split_on_fewer(sorted(fewer)), splitter_of(view).split(places, sorted(fewer))
    has_room_for_all = sorted(place for batch, _ in anew for place in batch) == sorted(places)
    assert again == (anew if has_room_for_all else [])


@settings(max_examples=100, deadline=None)
@given(
    lens=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    num_pages=st.sampled_from([20, 60, 1000]),
    most_tokens=st.sampled_from([300, 10_000]),
    number=st.integers(0, 3),
)
def test_on_fewer_instances_the_same_requests_cost_no_less_than_is_said_beforehand(
    lens: list[int], num_pages: int, most_tokens: int, number: int
) -> None:
    waits = [waiting(f"w{order}", order, length) for order, length in enumerate(lens)]
    view = dataclasses.replace(cluster(4, num_pages=num_pages, waits=waits), max_num_batched_tokens=most_tokens)
    splitter, window = splitter_of(view), Window(Sizes(view.waiting, view.shape, math.inf), 0.0, is_patient=True)
    batches = splitter.split(list(range(len(lens))), [0, 1, 2, 3])
    if not batches:
        return
    least, fewer = splitter.least_cost_on_fewer(number), splitter.split_on_fewer(list(range(number)))
    times = Times(HandModel(constant_s=0.1), 1)
    costs = [window.weight(places) * times.batch_of_s(len(group), *window.sums(places)) for places, group in fewer]
    assert least <= sum(costs) or not fewer
    num_slots = sum(window.pages[place] for places, _ in batches for place in places) * view.shape.page_size
    if num_slots <= num_pages * view.shape.page_size:  # memory is ample
        assert least == (pytest.approx(sum(costs)) if fewer else math.inf)


def test_where_memory_is_too_scattered_the_last_in_queue_order_are_left_out() -> None:
    """Each fills an instance, so that two of four have room."""
    waits = [waiting(f"w{order}", order, 80) for order in range(4)]
    batches = splitter_of(cluster(2, num_pages=5, page_size=16, waits=waits)).split([0, 1, 2, 3], [0, 1])
    assert batches == [([0], [0]), ([1], [1])]
