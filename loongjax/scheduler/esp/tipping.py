"""How much of a batch one prefill should take: up to the tipping point, what is behind it comes next.

While a prefill is bound by memory another request costs next to nothing, and it saves a prefill of its own, which takes
`fixed` seconds however small it is. Beyond, it delays those before it. So in the order in which the requests would best
follow each other the first r is put off for which

    (T(1..r) - T(1..r-1)) x sum of w before r  >  fixed x (sum of w from r on + that of the decodes paused).

With A + B tokens and n equal requests that is where the tokens exceed A / B, the model's tipping point, times the
requests put off: a long queue is served in larger batches.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from loongjax.core.cluster import InstanceId
from loongjax.costmodel.work import PrefillTotals
from loongjax.scheduler.esp.dispatch import Choice
from loongjax.scheduler.esp.times import Times
from loongjax.scheduler.esp.window import Window


class OrderedBatch(NamedTuple):
    """A batch of equation 5, and what of it one prefill takes."""

    places: list[int]
    """Of its requests in the window; if it starts, in the order in which they would best follow each other."""
    group: list[InstanceId]
    num_starting: int
    """The first of them, up to the tipping point; 0: the batch is not to start."""

    @property
    def starting(self) -> list[int]:
        return self.places[: self.num_starting]


@dataclasses.dataclass(frozen=True)
class Line:
    """Requests that would follow each other on one group."""

    lens: Sequence[int]
    """Tokens of each."""
    weights: Sequence[float]
    """What a second of waiting costs each."""
    paused_weight: float = 0.0
    """What a second costs the decodes that stand still for each prefill."""


def put_in_order(
    batches: Sequence[tuple[Sequence[int], list[InstanceId]]],
    choice: Choice,
    window: Window,
    times: Times,
    starting: set[InstanceId],
) -> list[OrderedBatch]:
    """The batches of a choice, given as (places, group). Nothing starts of those whose group is not all `starting`, and
    their requests stay in whatever order they are.
    """
    orders = [list(places) for places, _ in batches]
    alike: dict[int, list[int]] = {}
    for index, (_, group) in enumerate(batches):
        if starting.issuperset(group):
            orders[index].sort(key=window.rank.__getitem__)
            alike.setdefault(len(group), []).append(index)
    num_starting = [0] * len(batches)
    for dop, indices in alike.items():
        lines = [
            Line(
                lens=[window.lens[place] for place in orders[index]],
                weights=[window.weights[place] for place in orders[index]],
                paused_weight=choice.paused_weight(batches[index][1]),
            )
            for index in indices
        ]
        for index, number in zip(indices, tipping_points(times, dop, lines), strict=True):
            num_starting[index] = number
    return [
        OrderedBatch(order, group, number)
        for order, (_, group), number in zip(orders, batches, num_starting, strict=True)
    ]


def tipping_points(times: Times, dop: int, lines: Sequence[Line]) -> list[int]:
    """How many requests of each line, from its beginning, one prefill on `dop` instances should take."""
    tokens = [total for line in lines for total in itertools.accumulate(line.lens)]
    squares = [total for line in lines for total in itertools.accumulate([length * length for length in line.lens])]
    if len(tokens) == len(lines):
        return [1] * len(lines)
    seconds = times.prefill_s(dop, PrefillTotals.of_sums(tokens, squares)).tolist()
    fixed_s = times.least_prefill_s(dop)
    points: list[int] = []
    begin = 0
    for line in lines:
        end = begin + len(line.lens)
        points.append(_tipping_point(seconds[begin:end], line, fixed_s))
        begin = end
    return points


def _tipping_point(seconds: Sequence[float], line: Line, fixed_s: float) -> int:
    """Of one line, by the times of its first request, of its first two, and so on."""
    before, rest = 0.0, sum(line.weights) + line.paused_weight
    for number in range(1, len(seconds)):
        before += line.weights[number - 1]
        if (seconds[number] - seconds[number - 1]) * before > fixed_s * (rest - before):
            return number
    return len(seconds)
