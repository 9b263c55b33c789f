"""What is known of waiting requests for as long as they wait: what they take, and what they weigh at any time."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from loongjax.core.cluster import ClusterShape
from loongjax.scheduler.esp.objective import PrefillWeights
from loongjax.scheduler.view import WaitingView


class Sizes:
    """Tokens, pages and slots of some waiting requests, by their places among them.

    Args:
        requests: those.
        shape: the cluster's.
        implied_ttft_s: see `objective.PrefillWeights`.
    """

    def __init__(self, requests: Sequence[WaitingView], shape: ClusterShape, implied_ttft_s: float) -> None:
        self.requests = requests
        self.lens = [request.num_tokens for request in requests]
        self.arrivals_s = [request.arrival_s for request in requests]
        self.squared_lens = [length * length for length in self.lens]
        page_size = shape.page_size
        self.pages = [-(-request.num_tokens // page_size) if request.keeps_kv else 0 for request in requests]
        """Pages that each prefill leaves filled."""
        self.most = [(request.max_total_tokens + page_size) * request.keeps_kv for request in requests]
        """Slots that each may take in the end."""
        self.sum_of_most = sum(self.most)
        self.limited = np.array((self.lens, self.pages, self.most), np.int64)
        """Tokens, pages, and slots in the end, of which there is only so much: int64 [3, requests]."""
        self.by_length = sorted(range(len(requests)), key=self.lens.__getitem__, reverse=True)
        """Places, those of the longest first, and those of equal lengths in the order of the queue."""
        self.suspects = [place for place, request in enumerate(requests) if request.is_suspect]
        """Places."""
        self.weights = PrefillWeights(requests, implied_ttft_s)
        self._loads = np.zeros((4, len(requests)))
        self._loads[0] = self.lens
        self._loads[1] = self.squared_lens
        self._loads[3] = page_size * self.limited[1]

    @functools.cached_property
    def tokens(self) -> Int[np.ndarray, "3 requests"]:
        """Tokens that have keys, that there may be at most, and that were generated, as if all prefills were over; of
        who keeps no keys, nothing. Shared: not to be written to."""
        keeps = [request.keeps_kv for request in self.requests]
        most = [request.max_total_tokens for request in self.requests]
        generated = [request.num_output_tokens for request in self.requests]
        return np.array((self.lens, most, generated), np.int64) * np.array(keeps, bool)

    def loads(self, weights: Float[np.ndarray, " requests"]) -> Float[np.ndarray, "4 requests"]:
        """Length, squared length, weight, and slots that the prefill leaves filled, of each."""
        loads = self._loads.copy()
        loads[2] = weights
        return loads
