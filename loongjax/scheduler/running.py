"""Running requests, and the same in numbers."""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Int

from loongjax.scheduler.request_view import RunningView


class Running(tuple[RunningView, ...]):
    """Some running requests. A value: what is worked out of it stays with it."""

    @functools.cached_property
    def outputs(self) -> tuple[list[int], list[int]]:
        """(tokens generated so far, the longest possible output) of each."""
        return [request.num_output_tokens for request in self], [request.max_output_tokens for request in self]

    @functools.cached_property
    def table(self) -> Int[np.ndarray, "3 requests"]:
        """Of each the tokens with keys, those of them that were generated (at rest, all that were but the newest), and
        the most that there may be of these."""
        _, max_outputs = self.outputs
        num_tokens = [request.num_tokens for request in self]
        totals = [request.max_total_tokens for request in self]
        table = np.array((num_tokens, totals, max_outputs), np.int64)
        table[1] = table[0] - (table[1] - table[2])
        return table

    @functools.cached_property
    def num_tokens(self) -> int:
        """That have keys, of all of them."""
        return sum([request.num_tokens for request in self])

    @functools.cached_property
    def max_total_tokens(self) -> int:
        """What they may become together."""
        return sum([request.max_total_tokens for request in self])

    @functools.cached_property
    def have_paces(self) -> bool:
        """Whether any of them wishes for a time per token."""
        return not self.are_plain and [request.slo.tpot_s for request in self].count(None) < len(self)

    @functools.cached_property
    def are_plain(self) -> bool:
        """Whether none of them has a priority or wishes for a time per token."""
        return [request.priority or request.slo.tpot_s for request in self].count(None) == len(self)


NOBODY = Running()
