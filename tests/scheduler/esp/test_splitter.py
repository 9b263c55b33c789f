"""Equation 5 for a choice, and asked again on fewer instances, against asking anew."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.scheduler.draft import Draft
from loongjax.scheduler.esp.batching import SplitMemory
from loongjax.scheduler.esp.splitter import Splitter
from loongjax.scheduler.esp.times import Times
from loongjax.scheduler.esp.window import Window
from loongjax.scheduler.view import ClusterView
from tests.scheduler.esp.hand_model import HandModel
from tests.scheduler.views import cluster, waiting


def splitter_of(view: ClusterView) -> Splitter:
    window = Window(view.waiting, view.shape, view.now_s, math.inf, is_patient=True)
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


def test_where_memory_is_too_scattered_the_last_in_queue_order_are_left_out() -> None:
    """Each fills an instance, so that two of four have room."""
    waits = [waiting(f"w{order}", order, 80) for order in range(4)]
    batches = splitter_of(cluster(2, num_pages=5, page_size=16, waits=waits)).split([0, 1, 2, 3], [0, 1])
    assert batches == [([0], [0]), ([1], [1])]
