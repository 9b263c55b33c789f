"""Memory admission: whether everybody's keys will fit until they end."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from loongjax.scheduler.esp.config import Admission
from loongjax.scheduler.esp.output_lengths import OutputLengths
from loongjax.scheduler.esp.window import Window
from loongjax.scheduler.view import ClusterView


def peak_tokens(held: Int[np.ndarray, " requests"], left: Int[np.ndarray, " requests"]) -> int:
    """Slots that are taken at the worst moment, if all requests grow by a token a step and give back all at their end.

    Just before the k-th last request ends, the k last ones live, and each has grown by what that one grew: the most,
    over k, of k left_k + held_1 + ... + held_k in descending order of `left` (section 5.1 of the paper).

    Args:
        held: slots that each has now.
        left: tokens that each will still add.
    """
    order = left.argsort()[::-1]
    peaks = left.take(order) * np.arange(1, len(order) + 1) + held.take(order).cumsum()
    return int(np.maximum.reduce(peaks, initial=0))


class MemoryAdmission:
    """Lets requests in while the peak of all outputs, as long as they may become, fits the whole pool.

    Any token may lie on any instance, so the pool is one. What was promised and turns out too little is made up for by
    preemption. Nothing is worked out before somebody asks, which is when pages and tokens would suffice.

    Args:
        view: the cluster.
        candidates: waiting requests that may be let in.
        lengths: of outputs that have ended.
        admission: how long outputs are taken to become.
    """

    def __init__(
        self,
        view: ClusterView,
        candidates: Window,
        lengths: OutputLengths,
        admission: Admission,
    ) -> None:
        self._residents = view.residents
        self._window = candidates
        self._page_size = view.shape.page_size
        self._lengths = lengths
        self._admission: Admission = admission
        self._capacity = view.shape.num_instances * view.shape.num_slots

    @functools.cached_property
    def most(self) -> list[int]:
        """Slots that each candidate may take in the end, and if there is room for all of them, no less than that."""
        if self._is_ample:
            return self._window.sizes.most
        held, left = self._of_candidates
        return (held + left).tolist()

    @functools.cached_property
    def num_free(self) -> int:
        """Slots that are left when those that run take most at once; may be negative. Candidates that may not take more
        than these, together, fit: each adds no more to any moment than what it may take."""
        return self._capacity - (self._most_of_running if self._is_ample else peak_tokens(*self._of_running))

    def fits(self, candidates: Sequence[int]) -> bool:
        """Whether these fit beside what runs."""
        if self._is_ample or sum([self.most[place] for place in candidates]) <= self.num_free:
            return True
        those = [demands.take(candidates) for demands in self._of_candidates]
        held, left = [np.concatenate(both) for both in zip(self._of_running, those, strict=True)]
        return peak_tokens(held, left) <= self._capacity

    @functools.cached_property
    def _is_ample(self) -> bool:
        """Whether everybody fits, even if nobody ends before its limit: mostly that is all there is to know."""
        return self._most_of_running + self._window.sizes.sum_of_most <= self._capacity

    @functools.cached_property
    def _most_of_running(self) -> int:
        """Nobody takes more than its full length and the rest of a page."""
        return self._residents.max_total_tokens + self._page_size * self._residents.num_requests

    @functools.cached_property
    def _of_running(self) -> _Demands:
        return self._demands(self._residents.table)

    @functools.cached_property
    def _of_candidates(self) -> _Demands:
        return self._demands(self._window.sizes.tokens)

    def _demands(self, table: Int[np.ndarray, "3 requests"]) -> _Demands:
        """The last token of an output never gets a slot."""
        num_tokens, num_outputs, max_outputs = table
        final = max_outputs if self._admission == "worst-case" else self._lengths.bounds(num_outputs, max_outputs)
        left = np.maximum(final - (num_outputs + 1), 0)
        return _Demands(-(-num_tokens // self._page_size) * self._page_size, left)


class _Demands(NamedTuple):
    """Of each request."""

    held: Int[np.ndarray, " requests"]
    """Slots, in whole pages."""
    left: Int[np.ndarray, " requests"]
    """Tokens still to come."""
