"""How much of a batch one prefill should take: up to the tipping point, what is behind it comes next.

While a prefill is bound by memory another request costs next to nothing, and it saves a prefill of its own, which takes
`fixed` seconds however small it is. Beyond, it delays those before it. So in the order in which the requests would best
follow each other the first r is put off for which

    (T(1..r) - T(1..r-1)) x sum of w before r  >  fixed x (sum of w from r on + loss of the decodes paused).

With A + B tokens and n equal requests that is where the tokens exceed A / B, the model's tipping point, times the
requests put off: a long queue is served in larger batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from loongjax.core.cluster import InstanceId
from loongjax.scheduler.esp.dispatch import Choice
from loongjax.scheduler.esp.splitter import PlacedBatch
from loongjax.scheduler.esp.times import Times
from loongjax.scheduler.esp.window import Window


class OrderedBatch(NamedTuple):
    """A batch of equation 5, and what of it one prefill takes."""

    places: list[int]
    """Of its requests in the window; if it starts, in the order in which they would best follow each other."""
    group: list[InstanceId]
    num_starting: int = 0
    """The first of them, up to the tipping point; 0: the batch is not to start."""
    starting_s: float = 0.0
    """What they take."""
    whole_s: float = 0.0
    """What all of them would take, if the batch starts."""

    @property
    def starting(self) -> list[int]:
        return self.places[: self.num_starting]


class TippingPoint(NamedTuple):
    """How many requests of a line, from its beginning, one prefill should take."""

    number: int
    seconds: float
    """What that takes."""
    whole_s: float
    """What the whole line would take."""


class Line(NamedTuple):
    """Requests that would follow each other on one group."""

    lens: Sequence[int]
    """Tokens of each."""
    weights: Sequence[float]
    """What a second of waiting costs each."""
    loss_weight: float = 0.0
    """What a lost second costs the decodes that stand still for each prefill, and those who join them later."""


def put_in_order(
    batches: Sequence[PlacedBatch], choice: Choice, window: Window, times: Times, starting: set[InstanceId]
) -> list[OrderedBatch]:
    """The batches of a choice. Nothing starts of those whose group is not all `starting`, and their requests stay in
    whatever order they are.
    """
    ordered: list[OrderedBatch] = []
    lines: dict[int, list[tuple[int, Line]]] = {}
    """By the number of instances, those of the batches with these places in the list."""
    rank, lens, weights = window.rank, window.lens, window.weights
    for index, (places, group) in enumerate(batches):
        if starting.issuperset(group):
            places = sorted(places, key=rank.__getitem__)
            line = Line([lens[i] for i in places], [weights[i] for i in places], choice.loss_weight(group, times))
            lines.setdefault(len(group), []).append((index, line))
        ordered.append(OrderedBatch(places, group))
    for dop, alike in lines.items():
        points = tipping_points(times, dop, [line for _, line in alike])
        for (index, _), point in zip(alike, points, strict=True):
            places, group, *_ = ordered[index]
            ordered[index] = OrderedBatch(places, group, *point)
    return ordered


def tipping_points(times: Times, dop: int, lines: Sequence[Line]) -> list[TippingPoint]:
    """Of each line, on `dop` instances."""
    tokens = [total for line in lines for total in itertools.accumulate(line.lens)]
    squares = [total for line in lines for total in itertools.accumulate([length * length for length in line.lens])]
    if len(tokens) == len(lines):
        seconds = [times.batch_of_s(dop, *sums) for sums in zip(tokens, squares, strict=True)]
    else:
        seconds = times.batches_of_s(dop, np.array(tokens, np.float64), np.array(squares, np.float64)).tolist()
    fixed_s = times.least_prefill_s(dop)
    points: list[TippingPoint] = []
    begin = 0
    for line in lines:
        end = begin + len(line.lens)
        points.append(_tipping_point(seconds[begin:end], line, fixed_s))
        begin = end
    return points


def _tipping_point(seconds: Sequence[float], line: Line, fixed_s: float) -> TippingPoint:
    """Of one line, by the times of its first request, of its first two, and so on."""
    all_weight, upto = sum(line.weights) + line.loss_weight, itertools.accumulate(line.weights)
    steps = zip(upto, seconds, seconds[1:], strict=False)
    for number, (before, shorter_s, longer_s) in enumerate(steps, start=1):
        if (longer_s - shorter_s) * before > fixed_s * (all_weight - before):
            return TippingPoint(number, shorter_s, seconds[-1])
    return TippingPoint(len(seconds), seconds[-1], seconds[-1])
