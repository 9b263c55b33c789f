"""The order of the waiting queue: by priority, then by age."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Sequence

from loongjax.scheduler.view import WaitingView


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


_priority = operator.attrgetter("priority")
