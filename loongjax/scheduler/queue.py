"""Orders: that of the waiting queue, by priority and then by age, and by age alone."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Iterable, Sequence

from loongjax.scheduler.request_view import RunningView, WaitingView
from loongjax.scheduler.running import Running


def priority_classes(waiting: Sequence[WaitingView]) -> list[tuple[int, int]]:
    """Where the requests of each priority begin and end in a queue in its order; found by bisection."""
    classes: list[tuple[int, int]] = []
    begin = 0
    while begin < len(waiting):
        priority = waiting[begin].priority
        end = len(waiting)
        if waiting[-1].priority != priority:
            end = bisect.bisect_right(waiting, priority, lo=begin, key=_priority)
        classes.append((begin, end))
        begin = end
    return classes


def oldest_first(requests: Iterable[RunningView]) -> Running:
    return Running(sorted(requests, key=order_of))


order_of = operator.attrgetter("order")
"""The key to sort by age, oldest first."""
_priority = operator.attrgetter("priority")
