"""Who of the waiting queue an answer looks at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from loongjax.scheduler.esp.objective import priority_factor
from loongjax.scheduler.esp.sizes import Sizes
from loongjax.scheduler.esp.window import Window
from loongjax.scheduler.view import ClusterView, WaitingView

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
        self._queue: tuple[WaitingView, ...] = ()
        self._lens = np.empty(0)
        """Of the first `MAX_SEEN` of it."""
        self._found: list[WaitingView] = []
        self._sizes: Sizes | None = None
        self._window: Window | None = None

    def of(self, queue: tuple[WaitingView, ...]) -> list[WaitingView]:
        """In the order of the queue. Shared: not to be changed, and the same while they stay who they were."""
        if queue is not self._queue:
            seen = queue[:MAX_SEEN]
            self._lens = self._lens_of(seen)
            self._queue, found = queue, shortest(seen, self._lens, self._count)
            if found != self._found:
                self._found = found
        return self._found

    def _lens_of(self, seen: tuple[WaitingView, ...]) -> Float[np.ndarray, " requests"]:
        """Who has come since is behind those who were there, mostly."""
        before = self._queue[:MAX_SEEN]
        if seen[: len(before)] != before:
            return _lens(seen)
        return np.concatenate((self._lens, _lens(seen[len(before) :])))

    def window_of(self, requests: list[WaitingView], view: ClusterView, *, is_patient: bool) -> Window:
        """Of these candidates. Shared: not to be changed."""
        if self._sizes is None or self._sizes.requests is not requests:
            self._sizes, self._window = Sizes(requests, view.shape, self._implied_ttft_s), None
        if self._window is None or not self._window.still_holds(view.now_s, is_patient=is_patient):
            self._window = Window(self._sizes, view.now_s, is_patient=is_patient)
        return self._window


def shortest(waiting: Sequence[WaitingView], lens: Float[np.ndarray, " requests"], count: int) -> list[WaitingView]:
    """The first of these, and the shortest of the others, so many altogether, in the order of the queue.

    Short prompts weigh most for the time that they take, so behind a long queue they must not go unseen. A step of
    priority counts like half as long a prompt twice over, as it does in weight over time.

    Args:
        waiting: a queue.
        lens: tokens of each.
        count: how many.
    """
    if len(waiting) <= count:
        return list(waiting)
    keys = lens.copy()
    if waiting[0].priority or waiting[-1].priority:
        keys /= np.sqrt([priority_factor(request.priority) for request in waiting])
    keys[0] = -1.0
    places = np.argpartition(keys, count - 1)[:count]
    places.sort()
    return [waiting[place] for place in places.tolist()]


def _lens(waiting: Sequence[WaitingView]) -> Float[np.ndarray, " requests"]:
    return np.array([request.num_tokens for request in waiting], np.float64)
