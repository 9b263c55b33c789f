"""How many programs are compiled side by side before points are measured again, and how long that takes."""

from __future__ import annotations

import math

COMPILE_SHARE = 0.7
"""Of the time left, at most so much goes into the next programs."""


class CompilePace:
    """Learns from each wave of programs how long the next one will take.

    The first wave has one program of the model, so the first points come as soon as if programs were compiled as they
    are needed. Each wave may have twice as many as the one before, up to as many as there are threads: when it begins,
    as many are there already, so no point waits for twice as many programs as it would one by one, and for far fewer
    where threads help.

    Costs are in programs of the model (`waves.compile_cost`).
    """

    def __init__(self, num_threads: int) -> None:
        """Knows nothing yet."""
        self._most = float(num_threads)
        self._width = 1.0
        self._alone_s = 0.0
        """Of a program by itself."""
        self._per_cost_s = 0.0
        """Of one among many."""

    def width(self, left_s: float) -> float:
        """What the next wave may cost, at least 1, with so many seconds left (infinity: no limit)."""
        if math.isinf(left_s) or not self._per_cost_s:
            return self._width
        return max(1.0, min(self._width, COMPILE_SHARE * left_s / self._per_cost_s))

    def expected_s(self, cost: float) -> float:
        """Of a wave; 0 before there was any."""
        return max(min(cost, 1.0) * self._alone_s, cost * self._per_cost_s)

    def timeout_s(self, left_s: float) -> float | None:
        """After which nothing more of a wave is to be begun; None: there is no limit."""
        return None if math.isinf(left_s) else COMPILE_SHARE * left_s

    def note(self, cost: float, seconds: float) -> None:
        """Learns that a wave of this cost took so long."""
        if cost < 1.0:
            return
        if cost < 2.0:
            self._alone_s = seconds
        self._per_cost_s = seconds / cost
        if 2.0 * cost > self._width:
            self._width = min(self._most, 2.0 * self._width)
