"""The highest rate that a system sustains, and who of its requests are served well."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from loongjax.errors import ConfigError
from loongjax_profiling.records import RequestRecord

MAX_DOUBLINGS = 24


def highest_rate(is_sustained: Callable[[float], bool], *, start: float, precision: float = 0.02) -> float:
    """The highest rate at which something still holds, by doubling and then bisecting its logarithm.

    Args:
        is_sustained: whether it holds at a rate; once it does not, it is taken not to hold at any higher one.
        start: the rate to begin with, requests a second.
        precision: the answer is at most this much too low, relatively.

    Returns:
        A rate at which it holds, or 0 if it does not even at a tiny one.

    Raises:
        ConfigError: a start that is no rate, or no precision above 0.
    """
    if not 0.0 < start < math.inf or not precision > 0.0:
        raise ConfigError(f"a search needs a rate to start with and a precision, got {start} and {precision}")
    low = high = start
    if is_sustained(start):
        for _ in range(MAX_DOUBLINGS):
            high = 2.0 * low
            if not is_sustained(high):
                break
            low = high
        else:
            return low
    else:
        for _ in range(MAX_DOUBLINGS):
            low = high / 2.0
            if is_sustained(low):
                break
            high = low
        else:
            return 0.0
    while high > low * (1.0 + precision):
        middle = math.sqrt(low * high)
        if is_sustained(middle):
            low = middle
        else:
            high = middle
    return low


def keeps_up(records: Sequence[RequestRecord], tail: float) -> bool:
    """Whether what came was served while more came, not put off until nothing came any more.

    Args:
        records: of a benchmark, in any order.
        tail: a part of the time in which requests came; as long after the last one, all have to have ended. Infinite:
            it does not matter when.
    """
    issue_s = [record.issue_s for record in records]
    if not issue_s or tail == math.inf:
        return True
    begin_s, end_s = min(issue_s), max(issue_s)
    return max(record.complete_s for record in records) <= end_s + tail * (end_s - begin_s)


def least_attainment(records: Sequence[RequestRecord], num_length_classes: int = 1) -> float:
    """The part of the requests that met their wishes, 0 to 1, in the class of prompt lengths where it is least.

    Whoever serves short prompts first can let the longest tenth wait without end and still meet 90 % of all wishes;
    more than one class shows that.

    Args:
        records: of a benchmark.
        num_length_classes: of equally many requests each, from the shortest prompts to the longest; empty ones are
            passed over.
    """
    by_length = sorted(records, key=lambda record: record.prompt_len)
    edges = [len(by_length) * index // num_length_classes for index in range(num_length_classes + 1)]
    classes = [by_length[begin:end] for begin, end in itertools.pairwise(edges) if begin < end]
    return min((sum(record.meets_slo for record in part) / len(part) for part in classes), default=1.0)
