"""The waiting requests that one answer looks at, and what each of them weighs."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from loongjax.scheduler.esp.sizes import Sizes
from loongjax.scheduler.request_view import WaitingView


class Window:
    """Some waiting requests, by their place in the order in which they are tried.

    Args:
        sizes: of the requests, in that order.
        now_s: the engine's clock.
        is_patient: whether the first request may still be overtaken.
    """

    def __init__(self, sizes: Sizes, now_s: float, *, is_patient: bool) -> None:
        self.sizes = sizes
        self.is_patient = is_patient
        self._now_s = now_s
        self.requests = sizes.requests
        self.lens = sizes.lens
        self.pages = sizes.pages
        weights = sizes.weights.at(now_s)
        self.weights: list[float] = weights.tolist()
        """What a second of waiting costs."""
        self._loads = sizes.loads(weights)
        self._last_loads: tuple[Sequence[int], np.ndarray] = (), self._loads[:, :0]
        """Places that were asked about last, and the answer."""
        order = (-weights / self._loads[0]).argsort(kind="stable")
        if not is_patient:
            order = np.concatenate(([0], order[order != 0]))
        self._order = order
        self.order: list[int] = order.tolist()
        """Places in descending order of weight over length, in which one after the other costs least; behind the first
        request where it may be overtaken no more."""
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        self.rank: list[int] = rank.tolist()
        """Of each place in that order."""
        self._tokens_upto, self._pages_upto, self._slots_upto = (
            sizes.limited.take(order, axis=1).cumsum(axis=1).tolist()
        )
        self._num_before_suspects = min([self.rank[place] for place in sizes.suspects], default=len(self.requests))

    def still_holds(self, now_s: float, *, is_patient: bool) -> bool:
        """Whether it would be the same if it were made now."""
        return is_patient == self.is_patient and (now_s == self._now_s or self.sizes.weights.are_steady)

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, place: int) -> WaitingView:
        return self.requests[place]

    def num_first_within(self, num_tokens: int, num_pages: int) -> int:
        """How many of the first in order, none of them suspect, together take no more tokens and pages."""
        return min(
            bisect.bisect_right(self._tokens_upto, num_tokens),
            bisect.bisect_right(self._pages_upto, num_pages),
            self._num_before_suspects,
        )

    def num_first_of_most(self, num_slots: int) -> int:
        """How many of the first in order together take no more slots in the end."""
        return bisect.bisect_right(self._slots_upto, num_slots)

    def views(self, places: Sequence[int]) -> list[WaitingView]:
        return [self.requests[place] for place in places]

    def weight(self, places: Sequence[int]) -> float:
        """Of these requests together."""
        return sum(map(self.weights.__getitem__, places))

    def sums(self, places: Sequence[int]) -> tuple[int, int]:
        """The sum of these requests' lengths, and that of their squares."""
        return sum(map(self.lens.__getitem__, places)), sum(map(self.sizes.squared_lens.__getitem__, places))

    def longest_first(self, places: Sequence[int]) -> list[int]:
        """The same, those of equal lengths in the order of the queue."""
        chosen = set(places)
        return [place for place in self.sizes.by_length if place in chosen]

    def loads(self, places: Sequence[int]) -> Float[np.ndarray, "4 places"]:
        """Length, squared length, weight, and slots that the prefill leaves filled, of each of these requests. Shared:
        not to be written to.
        """
        asked, found = self._last_loads
        if places != asked:
            found = self._loads.take(np.array(places, np.intp), axis=1)
            self._last_loads = list(places), found
        return found

    def growing(self, places: Sequence[int]) -> Float[np.ndarray, "3 places"]:
        """Sums of lengths, squared lengths and weights of the first of these requests, of the first two, and so on."""
        if places == self.order[: len(places)]:
            return self._growing[:, : len(places)]
        return self.loads(places)[:3].cumsum(axis=1)

    @functools.cached_property
    def _growing(self) -> Float[np.ndarray, "3 requests"]:
        """Of all requests in order."""
        return self._loads[:3].take(self._order, axis=1).cumsum(axis=1)
