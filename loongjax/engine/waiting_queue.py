"""Requests that wait for their prefill."""

from __future__ import annotations

import array
import bisect
from collections.abc import Iterator

import numpy as np

from loongjax.engine.live_request import LiveRequest
from loongjax.scheduler.request_view import WaitingView
from loongjax.scheduler.waiting import NUM_COLUMNS, Waiting, columns_of

_MIN_ROWS = 64


class WaitingQueue:
    """Requests by priority, then in order of arrival. One that was preempted comes back to its old place."""

    def __init__(self) -> None:
        self._requests: list[LiveRequest] = []
        self._views: list[WaitingView] = []
        self._rows = array.array("q")
        """Of the table, one of each request."""
        self._table = np.empty((_MIN_ROWS, NUM_COLUMNS))
        """What `columns_of` says of requests, one a row."""
        self._free_rows = list(range(_MIN_ROWS))
        """Of the table."""
        self._snapshot: Waiting | None = Waiting()

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[LiveRequest]:
        return iter(self._requests)

    def __contains__(self, live: LiveRequest) -> bool:
        index = self._index(live)
        return index < len(self._requests) and self._requests[index] is live

    def add(self, live: LiveRequest) -> None:
        assert live not in self, live.request_id
        index, view = self._index(live), live.waiting_view()
        if not self._free_rows:
            num_rows = len(self._table)
            self._table = np.concatenate((self._table, np.empty_like(self._table)))
            self._free_rows = list(range(num_rows, 2 * num_rows))
        row = self._free_rows.pop()
        self._table[row] = columns_of(view)
        self._requests.insert(index, live)
        self._views.insert(index, view)
        self._rows.insert(index, row)
        self._snapshot = None

    def remove(self, live: LiveRequest) -> None:
        assert live in self, live.request_id
        index = self._index(live)
        del self._requests[index], self._views[index]
        self._free_rows.append(self._rows.pop(index))
        self._snapshot = None

    def views(self) -> Waiting:
        """In queue order; the same tuple until the queue changes."""
        if self._snapshot is None:
            table = self._table.take(np.array(self._rows, np.int64), axis=0).T.copy()
            self._snapshot = Waiting.with_table(self._views, table)
        return self._snapshot

    def _index(self, live: LiveRequest) -> int:
        return bisect.bisect_left(self._requests, _rank(live), key=_rank)


def _rank(live: LiveRequest) -> tuple[int, int]:
    return live.request.priority, live.order
