"""Waiting requests, and the same in numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float

from loongjax.scheduler.queue import order_of, priority_classes
from loongjax.scheduler.request_view import WaitingView

NUM_COLUMNS = 8
NUM_TOKENS, MAX_TOTAL_TOKENS, NUM_OUTPUT_TOKENS, KEEPS_KV, IS_SUSPECT, PRIORITY, ARRIVAL_S, TTFT_S = range(NUM_COLUMNS)
"""Of what `columns_of` says; of `Waiting.table`, the rows."""


class Waiting(tuple[WaitingView, ...]):
    """A queue or a part of it, which policies search by arrays rather than request by request."""

    @classmethod
    def with_table(cls, requests: Iterable[WaitingView], table: Float[np.ndarray, "8 requests"]) -> Waiting:
        """These requests, whose `table` is known."""
        waiting = cls(requests)
        waiting.__dict__["table"] = table
        return waiting

    @functools.cached_property
    def oldest(self) -> WaitingView:
        """Of a queue in its order, in which only the first of each priority has to be looked at."""
        return min([self[begin] for begin, _ in priority_classes(self)], key=order_of)

    @functools.cached_property
    def table(self) -> Float[np.ndarray, "8 requests"]:
        """What `columns_of` says of each. Not to be written to."""
        return np.array([columns_of(request) for request in self], np.float64).reshape(len(self), NUM_COLUMNS).T.copy()


def columns_of(request: WaitingView) -> tuple[int | float, ...]:
    """What a request's view says. The time that it wishes for to its first token, in seconds, is infinite if there is
    no such wish, or its first token has come.
    """
    ttft_s = request.slo.ttft_s
    return (
        request.num_tokens,
        request.max_total_tokens,
        request.num_output_tokens,
        request.keeps_kv,
        request.is_suspect,
        request.priority,
        request.arrival_s,
        math.inf if ttft_s is None or request.num_output_tokens else ttft_s,
    )
