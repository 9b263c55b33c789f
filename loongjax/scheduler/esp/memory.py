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
    order = np.argsort(-left, kind="stable")
    return int(np.max(left[order] * np.arange(1, len(order) + 1) + np.cumsum(held[order]), initial=0))


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
        closer = self._closer
        return self._window.sizes.most if closer is None else (closer.candidates_held + closer.candidates_left).tolist()

    @functools.cached_property
    def num_free(self) -> int:
        """Slots that are left when those that run take most at once; may be negative. Candidates that may not take more
        than these, together, fit: each adds no more to any moment than what it may take."""
        closer = self._closer
        return self._capacity - (self._most_of_running if closer is None else peak_tokens(closer.held, closer.left))

    def fits(self, candidates: Sequence[int]) -> bool:
        """Whether these fit beside what runs."""
        closer = self._closer
        if closer is None or sum([self.most[place] for place in candidates]) <= self.num_free:
            return True
        places = np.array(candidates, np.int64)
        held = np.concatenate((closer.held, closer.candidates_held[places]))
        left = np.concatenate((closer.left, closer.candidates_left[places]))
        return peak_tokens(held, left) <= self._capacity

    @property
    def _most_of_running(self) -> int:
        """Nobody takes more than its full length and the rest of a page."""
        return self._residents.max_total_tokens + self._page_size * self._residents.num_requests

    @functools.cached_property
    def _closer(self) -> _Demands | None:
        """Mostly the most that anybody takes is all there is to know."""
        if self._most_of_running + self._window.sizes.sum_of_most <= self._capacity:
            return None
        table = self._residents.columns
        held, left = self._demands(np.concatenate((table, self._window.sizes.tokens), axis=1))
        count = table.shape[1]
        return _Demands(held[:count], left[:count], held[count:], left[count:])

    def _demands(
        self, table: Int[np.ndarray, "3 requests"]
    ) -> tuple[Int[np.ndarray, " requests"], Int[np.ndarray, " requests"]]:
        """Slots held, in whole pages, and tokens still to come; the last token of an output never gets a slot."""
        num_tokens, max_total_tokens, num_output_tokens = table
        num_prompt_tokens = num_tokens - num_output_tokens
        final = max_tokens = max_total_tokens - num_prompt_tokens
        if self._admission == "quantile":
            final = self._lengths.bounds(num_output_tokens, max_tokens)
        left = np.maximum(num_prompt_tokens + final - 1 - num_tokens, 0)
        return -(-num_tokens // self._page_size) * self._page_size, left


class _Demands(NamedTuple):
    """Slots held, and tokens still to come."""

    held: Int[np.ndarray, " running"]
    left: Int[np.ndarray, " running"]
    candidates_held: Int[np.ndarray, " candidates"]
    candidates_left: Int[np.ndarray, " candidates"]
