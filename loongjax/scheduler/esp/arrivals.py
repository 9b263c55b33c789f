"""How much weight arrives a second, as far as the waiting queue has shown."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

from loongjax.scheduler.esp.objective import prefill_weight
from loongjax.scheduler.queue import order_of, priority_classes
from loongjax.scheduler.request_view import WaitingView

REMEMBERED = 128
"""Arrivals after which one counts 1 / e of what it did."""
_KEPT = 1.0 - 1.0 / REMEMBERED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrivals:
    """What has arrived, the newest counting most.

    Both sums shrink by the same factor with every arrival, so that their ratio follows the rate over about the last
    `REMEMBERED` of them, however fast they come. The first one only starts the clock: a queue that came all at once
    says nothing about what follows. The time since the last one counts too, so where nobody comes the rate falls.
    """

    weight: float = 0.0
    """Of a second's waiting, summed over arrivals (`objective.prefill_weight`)."""
    tokens: float = 0.0
    """Weight times length, so that `tokens / weight` is the length of what weighs."""
    squared_tokens: float = 0.0
    """Weight times length squared."""
    seconds: float = 0.0
    """From the first of them to the last."""
    last_order: int = -1
    """Of the newest request seen."""
    last_s: float = 0.0
    """When it arrived, on the engine's clock."""

    def after(self, waiting: Sequence[WaitingView]) -> Arrivals:
        """With those of a queue, in queue order, that were not seen before. Who was preempted has been seen."""
        new = self._unseen(waiting)
        if not new:
            return self
        weight, tokens, squared_tokens = self.weight, self.tokens, self.squared_tokens
        seconds, last_s = self.seconds, self.last_s
        newest = new[-1].order
        if self.last_order < 0:
            last_s = max(last_s, new[0].arrival_s)
            del new[0]
        for request in new:
            arrival_s = request.arrival_s
            seconds *= _KEPT
            if arrival_s > last_s:
                seconds += arrival_s - last_s
                last_s = arrival_s
            if seconds > 0.0:
                own, length = prefill_weight(request), request.num_tokens
                weight = weight * _KEPT + own
                tokens = tokens * _KEPT + own * length
                squared_tokens = squared_tokens * _KEPT + own * length**2
        return Arrivals(
            weight=weight,
            tokens=tokens,
            squared_tokens=squared_tokens,
            seconds=seconds,
            last_order=newest,
            last_s=last_s,
        )

    def weight_per_s(self, now_s: float) -> float:
        """What a second of everybody's waiting grows by in a second; 0 before a second arrival."""
        seconds = self.seconds + max(0.0, now_s - self.last_s)
        return self.weight / seconds if self.weight else 0.0

    @property
    def sums(self) -> tuple[int, int]:
        """The mean length, and the mean squared length, of what weighs; 0 before a second arrival."""
        if not self.weight:
            return 0, 0
        return round(self.tokens / self.weight), round(self.squared_tokens / self.weight)

    def _unseen(self, waiting: Sequence[WaitingView]) -> list[WaitingView]:
        """In order of arrival. Within a priority the newest are last."""
        new: list[WaitingView] = []
        classes = priority_classes(waiting)
        for begin, end in classes:
            first = bisect.bisect_right(waiting, self.last_order, lo=begin, hi=end, key=order_of)
            new += waiting[first:end]
        if len(classes) > 1:
            new.sort(key=order_of)
        return new
