"""The waiting queue is in its order, and its table says what its requests do."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from loongjax.core.request import ServiceLevel
from loongjax.engine.live_request import LiveRequest
from loongjax.engine.waiting_queue import WaitingQueue
from loongjax.scheduler.waiting import Waiting
from tests.engine.cluster import Cluster

BASE = Cluster().request("a", 8, 20)


def test_the_queue_is_by_priority_and_then_by_age() -> None:
    queue = WaitingQueue()
    places = {"old": (0, 1), "urgent": (-1, 3), "young": (0, 2), "patient": (5, 0)}
    lives = {
        name: LiveRequest(dataclasses.replace(BASE, request_id=name, priority=priority), order, 0.0)
        for name, (priority, order) in places.items()
    }
    for live_request in lives.values():
        queue.add(live_request)
    assert [view.request_id for view in queue.views()] == ["urgent", "old", "young", "patient"]
    queue.remove(lives["old"])
    assert lives["old"] not in queue
    queue.add(lives["old"])
    assert [view.request_id for view in queue.views()] == ["urgent", "old", "young", "patient"]


def test_the_same_tuple_is_shown_until_somebody_comes_or_goes() -> None:
    queue, live = WaitingQueue(), LiveRequest(BASE, 0, 0.0)
    queue.add(live)
    first = queue.views()
    assert queue.views() is first
    queue.remove(live)
    assert queue.views() == ()
    assert first[0].request_id == BASE.request_id, "what was shown stays as it was"


@given(
    changes=st.lists(st.tuples(st.integers(0, 99), st.integers(-1, 1), st.sampled_from([None, 2.0])), max_size=150),
    num_seen=st.integers(1, 20),
)
def test_the_table_follows_whoever_comes_and_goes(changes: list[tuple[int, int, float | None]], num_seen: int) -> None:
    """Who is there goes, who is not comes; in between somebody looks."""
    queue, there = WaitingQueue(), {}
    for step, (order, priority, ttft_s) in enumerate(changes):
        if order in there:
            queue.remove(there.pop(order))
        else:
            request = dataclasses.replace(
                BASE,
                request_id=f"r{order}",
                prompt_token_ids=(0,) * (order % 7 + 1),
                priority=priority,
                slo=ServiceLevel(ttft_s=ttft_s),
            )
            there[order] = LiveRequest(request, order, float(step))
            queue.add(there[order])
        if step % num_seen == 0:
            _check(queue)
    _check(queue)


def _check(queue: WaitingQueue) -> None:
    views = queue.views()
    assert list(views) == [live.waiting_view() for live in queue]
    assert np.array_equal(views.table, Waiting(views).table)
