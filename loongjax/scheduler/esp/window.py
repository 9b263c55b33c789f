"""The waiting requests that one answer looks at, and what each of them takes and weighs."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from loongjax.core.cluster import ClusterShape
from loongjax.scheduler.esp.objective import prefill_weight
from loongjax.scheduler.view import WaitingView


class Window:
    """Some waiting requests, by their place in the order in which they are tried.

    Args:
        requests: in that order.
        shape: the cluster's.
        now_s: the engine's clock.
        implied_ttft_s: see `objective.prefill_weight`.
        is_patient: whether the first request may still be overtaken.
    """

    def __init__(
        self,
        requests: Sequence[WaitingView],
        shape: ClusterShape,
        now_s: float,
        implied_ttft_s: float,
        *,
        is_patient: bool,
    ) -> None:
        self.requests = requests
        self.is_patient = is_patient
        self._now_s = now_s
        self._has_wishes = any(request.slo.ttft_s is not None for request in requests)
        self.lens = [request.num_tokens for request in requests]
        self.squared_lens = [length * length for length in self.lens]
        self.pages = [shape.num_pages_for(request.num_tokens) if request.keeps_kv else 0 for request in requests]
        """Pages that each prefill leaves filled."""
        self.most = [(request.max_total_tokens + shape.page_size) * request.keeps_kv for request in requests]
        """Slots that each may take in the end."""
        self.sum_of_most = sum(self.most)
        self.weights = [prefill_weight(request, now_s, implied_ttft_s) for request in requests]
        """What a second of waiting costs."""
        self.urgencies = [weight / length for weight, length in zip(self.weights, self.lens, strict=True)]
        """Weight over length: in descending order of it, one after the other costs least."""
        self.order = sorted(range(len(requests)), key=self.urgencies.__getitem__, reverse=True)
        """Places in that order, behind the first request where it may be overtaken no more."""
        if not is_patient:
            self.order.remove(0)
            self.order.insert(0, 0)
        self.rank = [0] * len(requests)
        """Of each place in that order."""
        for rank, place in enumerate(self.order):
            self.rank[place] = rank
        self._tokens_upto = _sums_upto([self.lens[place] for place in self.order])
        self._pages_upto = _sums_upto([self.pages[place] for place in self.order])
        self._most_upto = _sums_upto([self.most[place] for place in self.order])
        suspects = [rank for rank, place in enumerate(self.order) if requests[place].is_suspect]
        self._num_before_suspects = suspects[0] if suspects else len(requests)
        self._loads = np.array(
            (
                self.lens,
                self.squared_lens,
                self.weights,
                [pages * shape.page_size for pages in self.pages],
            ),
            np.float64,
        )
        self._by_length = sorted(range(len(requests)), key=self.lens.__getitem__, reverse=True)
        self._growing = self._sums_growing(self.order)

    def still_holds(self, requests: Sequence[WaitingView], now_s: float, *, is_patient: bool) -> bool:
        """Whether it would be the same if it were made of this list now. Without wishes nobody's weight changes."""
        is_as_urgent = not self._has_wishes or now_s == self._now_s
        return requests is self.requests and is_patient == self.is_patient and is_as_urgent

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, place: int) -> WaitingView:
        return self.requests[place]

    def num_first_within(self, num_tokens: int, num_pages: int, num_slots: int) -> int:
        """How many of the first in order, none of them suspect, together take no more tokens, pages and slots."""
        return min(
            bisect.bisect_right(self._tokens_upto, num_tokens) - 1,
            bisect.bisect_right(self._pages_upto, num_pages) - 1,
            bisect.bisect_right(self._most_upto, num_slots) - 1,
            self._num_before_suspects,
        )

    def views(self, places: Sequence[int]) -> list[WaitingView]:
        return [self.requests[place] for place in places]

    def weight(self, places: Sequence[int]) -> float:
        """Of these requests together."""
        return sum(map(self.weights.__getitem__, places))

    def sums(self, places: Sequence[int]) -> tuple[int, int]:
        """The sum of these requests' lengths, and that of their squares."""
        return sum(map(self.lens.__getitem__, places)), sum(map(self.squared_lens.__getitem__, places))

    def longest_first(self, places: Sequence[int]) -> list[int]:
        """The same, those of equal lengths in the order of the queue."""
        chosen = set(places)
        return [place for place in self._by_length if place in chosen]

    def loads(self, places: Sequence[int]) -> Float[np.ndarray, "4 places"]:
        """Length, squared length, weight, and slots that the prefill leaves filled, of each of these requests."""
        return self._loads.take(np.array(places, np.intp), axis=1)

    def growing(self, places: Sequence[int]) -> Float[np.ndarray, "3 places"]:
        """Sums of lengths, squared lengths and weights of the first of these requests, of the first two, and so on."""
        if places == self.order[: len(places)]:
            return self._growing[:, : len(places)]
        return self._sums_growing(places)

    def _sums_growing(self, places: Sequence[int]) -> Float[np.ndarray, "3 places"]:
        return self.loads(places)[:3].cumsum(axis=1)


def _sums_upto(numbers: Sequence[int]) -> list[int]:
    """Of the first 0, 1, ... of them."""
    return [*itertools.accumulate(numbers, initial=0)]
