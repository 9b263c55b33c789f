"""What is known of waiting requests for as long as they wait: what they take, and what they weigh at any time."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from loongjax.core.cluster import ClusterShape
from loongjax.scheduler.esp.objective import PrefillWeights
from loongjax.scheduler.waiting import ARRIVAL_S, IS_SUSPECT, KEEPS_KV, Waiting


class Sizes:
    """Tokens, pages and slots of some waiting requests, by their places among them.

    Args:
        requests: those.
        shape: the cluster's.
        implied_ttft_s: see `objective.PrefillWeights`.
    """

    def __init__(self, requests: Waiting, shape: ClusterShape, implied_ttft_s: float) -> None:
        self.requests = requests
        whole = requests.table[: KEEPS_KV + 1].astype(np.int64)
        lens, max_total_tokens, num_outputs, keeps_kv = whole
        squared_lens, page_size = lens * lens, shape.page_size
        self.lens: list[int] = lens.tolist()
        self.arrivals_s: list[float] = requests.table[ARRIVAL_S].tolist()
        self.squared_lens: list[int] = squared_lens.tolist()
        pages, most = -(-lens // page_size) * keeps_kv, (max_total_tokens + page_size) * keeps_kv
        self.pages: list[int] = pages.tolist()
        """Pages that each prefill leaves filled."""
        self.least_pages = min(self.pages, default=0)
        self.most: list[int] = most.tolist()
        """Slots that each may take in the end."""
        self.sum_of_most = int(most.sum())
        self.limited = np.stack((lens, pages, most))
        """Tokens, pages, and slots in the end, of which there is only so much: int64 [3, requests]."""
        self.by_length: list[int] = (-lens).argsort(kind="stable").tolist()
        """Places, those of the longest first, and those of equal lengths in the order of the queue."""
        self.suspects = frozenset(requests.table[IS_SUSPECT].nonzero()[0].tolist())
        """Places."""
        self.tokens = np.stack((lens, num_outputs, max_total_tokens - lens + num_outputs)) * keeps_kv
        """As `Running.table`, as if all prefills were over; of who keeps no keys, nothing. Shared: not to be written
        to."""
        self.weights = PrefillWeights(requests, implied_ttft_s)
        self._loads = np.stack((lens, squared_lens, np.zeros_like(lens), page_size * pages)).astype(np.float64)

    def loads(self, weights: Float[np.ndarray, " requests"]) -> Float[np.ndarray, "4 requests"]:
        """Length, squared length, weight, and slots that the prefill leaves filled, of each."""
        loads = self._loads.copy()
        loads[2] = weights
        return loads
