"""In what order those who wait for a group are let in."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from loongjax.scheduler.queue import order_of
from loongjax.scheduler.request_view import WaitingView

MAX_OVERTAKES = 16
"""Prefills that leave the oldest waiting request out before it comes first, whatever its priority."""


class Line:
    """By priority, then by age; but the oldest of them comes first once others were let in before it often enough."""

    def __init__(self) -> None:
        self._num_overtakes = 0
        """Times that others were let in since the oldest was."""

    def copy(self) -> Line:
        """Another one with the same memories, which goes its own way from now on."""
        return copy.copy(self)

    def in_order(self, waiting: Sequence[WaitingView]) -> Sequence[WaitingView]:
        """Those who wait, who are given in the order of the queue."""
        if self._num_overtakes < MAX_OVERTAKES or not waiting:
            return waiting
        oldest = min(waiting, key=order_of)
        return [oldest, *(request for request in waiting if request is not oldest)]

    def note_let_in(self, waiting: Sequence[WaitingView], let_in: Sequence[WaitingView]) -> None:
        """Notes that of those who wait these are prefilled, at least one of them."""
        oldest = min(waiting, key=order_of)
        self._num_overtakes = 0 if oldest in let_in else self._num_overtakes + 1
