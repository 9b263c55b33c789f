"""Who of the waiting queue an answer looks at."""

from __future__ import annotations

import numpy as np

from loongjax.scheduler.esp.objective import priority_factors
from loongjax.scheduler.esp.sizes import Sizes
from loongjax.scheduler.esp.window import Window
from loongjax.scheduler.view import ClusterView
from loongjax.scheduler.waiting import NUM_TOKENS, PRIORITY, Waiting

MAX_SEEN = 1024
"""Waiting requests among which the shortest are looked for."""


class Candidates:
    """Those of the last queue that was asked about, and what they take and weigh.

    The engine shows the same tuple until its queue changes, and most questions are asked because a step has ended.

    Args:
        count: how many to look at.
        implied_ttft_s: see `objective.PrefillWeights`.
    """

    def __init__(self, count: int, implied_ttft_s: float) -> None:
        self._count = count
        self._implied_ttft_s = implied_ttft_s
        self._queue = Waiting()
        self._found = Waiting()
        self._sizes: Sizes | None = None
        self._window: Window | None = None

    def of(self, queue: Waiting) -> Waiting:
        """In the order of the queue. Shared: the same while they stay who they were."""
        if queue is not self._queue:
            self._queue, found = queue, shortest(queue, self._count)
            if found != self._found:
                self._found = found
        return self._found

    def window_of(self, requests: Waiting, view: ClusterView, *, is_patient: bool) -> Window:
        """Of these candidates. Shared: not to be changed."""
        if self._sizes is None or self._sizes.requests is not requests:
            self._sizes, self._window = Sizes(requests, view.shape, self._implied_ttft_s), None
        if self._window is None or not self._window.still_holds(view.now_s, is_patient=is_patient):
            self._window = Window(self._sizes, view.now_s, is_patient=is_patient)
        return self._window


def shortest(waiting: Waiting, count: int) -> Waiting:
    """The first of the first `MAX_SEEN` of a queue, and the shortest of those, so many altogether, in its order.

    Short prompts weigh most for the time that they take, so behind a long queue they must not go unseen. A step of
    priority counts like half as long a prompt twice over, as it does in weight over time.
    """
    if len(waiting) <= count:
        return waiting
    keys, priorities = waiting.table[NUM_TOKENS, :MAX_SEEN].copy(), waiting.table[PRIORITY, :MAX_SEEN]
    if priorities[0] or priorities[-1]:
        keys /= np.sqrt(priority_factors(priorities))
    keys[0] = -1.0
    places = np.argpartition(keys, count - 1)[:count]
    places.sort()
    return Waiting.with_table([waiting[place] for place in places.tolist()], waiting.table.take(places, axis=1))
