"""Who of the waiting queue an answer looks at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loongjax.scheduler.esp.objective import priority_factor
from loongjax.scheduler.view import WaitingView

MAX_SEEN = 1024
"""Waiting requests among which the shortest are looked for."""


class Candidates:
    """Those of the last queue that was asked about.

    The engine shows the same tuple until its queue changes, and most questions are asked because a step has ended.
    """

    def __init__(self, count: int) -> None:
        """`count`: how many to look at."""
        self._count = count
        self._queue: tuple[WaitingView, ...] = ()
        self._found: list[WaitingView] = []

    def of(self, queue: tuple[WaitingView, ...]) -> list[WaitingView]:
        """In the order of the queue. Shared: not to be changed."""
        if queue is not self._queue:
            self._queue, self._found = queue, shortest(queue[:MAX_SEEN], self._count)
        return self._found


def shortest(waiting: Sequence[WaitingView], count: int) -> list[WaitingView]:
    """The first of these, and the shortest of the others, so many altogether, in the order of the queue.

    Short prompts weigh most for the time that they take, so behind a long queue they must not go unseen. A step of
    priority counts like half as long a prompt twice over, as it does in weight over time.
    """
    if len(waiting) <= count:
        return list(waiting)
    lens = np.array([request.num_tokens for request in waiting], np.float64)
    if waiting[0].priority or waiting[-1].priority:
        lens /= np.sqrt([priority_factor(request.priority) for request in waiting])
    lens[0] = -1.0
    places = np.argpartition(lens, count - 1)[:count]
    places.sort()
    return [waiting[place] for place in places.tolist()]
