"""The part of the KV pool that one request holds."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from loongjax.core.cluster import InstanceId
from loongjax.core.iteration import InstanceTable

_MIN_CAPACITY = 8


class LocalSequence:
    """The tokens of one request that one instance holds.

    They form a dense sequence of their own: local token j lies in the sequence's page j // page_size at offset
    j % page_size. `intervals` says, in local order, which tokens of the request they are.
    """

    __slots__ = (
        "_buffer",
        "_num_pages",
        "_readonly_buffer",
        "_table",
        "instance",
        "intervals",
        "last_page",
        "num_tokens",
    )

    def __init__(self, instance: InstanceId) -> None:
        self.instance = instance
        self.num_tokens = 0
        self.intervals: list[list[int]] = []
        """[begin, end) of the request's tokens, in local order; the last one grows in place."""
        self.last_page = -1
        """The newest page; -1 if there is none."""
        self._num_pages = 0
        self._table: InstanceTable | None = None
        self._set_buffer(np.empty(_MIN_CAPACITY, np.int32))

    @property
    def page_indices(self) -> np.ndarray:
        """int32 [pages], in local order, read-only. Stays as it is whatever happens to the sequence later."""
        return self._readonly_buffer[: self._num_pages]

    @property
    def table(self) -> InstanceTable:
        table = self._table
        if table is None or table.num_tokens != self.num_tokens:
            table = self._table = InstanceTable(self.instance, self.page_indices, self.num_tokens)
        return table

    def add_page(self, page: int) -> None:
        num_pages = self._num_pages
        if num_pages == len(self._buffer):
            self._grow(num_pages + 1)
        self._buffer[num_pages] = page
        self._num_pages = num_pages + 1
        self._table = None
        self.last_page = page

    def add_pages(self, pages: np.ndarray) -> None:
        if not len(pages):
            return
        num_pages = self._num_pages + len(pages)
        if num_pages > len(self._buffer):
            self._grow(num_pages)
        self._buffer[self._num_pages : num_pages] = pages
        self._num_pages = num_pages
        self._table = None
        self.last_page = int(pages[-1])

    def remove_last_pages(self, num_pages: int) -> np.ndarray:
        """Drops the last pages and returns them. Later pages go to a new buffer, so tables handed out stay right."""
        num_left = self._num_pages - num_pages
        removed = self._buffer[num_left : self._num_pages].copy()
        if num_pages:
            kept = self._buffer[:num_left]
            buffer = np.empty(max(_MIN_CAPACITY, num_left), np.int32)
            buffer[:num_left] = kept
            self._set_buffer(buffer)
            self._num_pages = num_left
            self._table = None
            self.last_page = int(buffer[num_left - 1]) if num_left else -1
        return removed

    def add_interval(self, begin: int, end: int) -> None:
        """Adds tokens [begin, end) at the end of the local sequence; their pages must be there."""
        if self.intervals and self.intervals[-1][1] == begin:
            self.intervals[-1][1] = end
        else:
            self.intervals.append([begin, end])
        self.num_tokens += end - begin

    def remove_last_tokens(self, num_tokens: int) -> list[tuple[int, int]]:
        """Drops the last local tokens, not their pages, and returns the intervals that they were, in local order."""
        self.num_tokens -= num_tokens
        removed: list[tuple[int, int]] = []
        while num_tokens:
            begin, end = self.intervals[-1]
            cut = max(begin, end - num_tokens)
            removed.append((cut, end))
            num_tokens -= end - cut
            if cut == begin:
                self.intervals.pop()
            else:
                self.intervals[-1][1] = cut
        removed.reverse()
        return removed

    def check_integrity(self, page_size: int) -> None:
        """Asserts that intervals, pages and the table that would be handed out say the same."""
        assert self.num_tokens > 0, "an empty local sequence"
        assert self.num_tokens == sum(end - begin for begin, end in self.intervals), self.intervals
        pages = self.page_indices
        assert len(pages) == -(-self.num_tokens // page_size), (pages, self.num_tokens)
        assert self.last_page == pages[-1], (self.last_page, pages)
        # Not through the property, which would renew a table that is behind by some tokens.
        table = self._table
        is_current = table is not None and table.num_tokens == self.num_tokens
        assert table is None or not is_current or np.array_equal(table.page_indices, pages), "a stale table"

    def slots(self, begin: int, end: int, page_size: int) -> np.ndarray:
        """Slots of the local tokens [begin, end): int32 [end - begin]; slot = page * page_size + offset."""
        if begin == end:
            return np.empty(0, np.int32)
        first_page = begin // page_size
        pages = self._buffer[first_page : -(-end // page_size)]
        slots = pages[:, None] * np.int32(page_size) + np.arange(page_size, dtype=np.int32)
        offset = first_page * page_size
        return slots.reshape(-1)[begin - offset : end - offset]

    def _grow(self, num_pages: int) -> None:
        buffer = np.empty(max(2 * len(self._buffer), num_pages), np.int32)
        buffer[: self._num_pages] = self._buffer[: self._num_pages]
        self._set_buffer(buffer)

    def _set_buffer(self, buffer: np.ndarray) -> None:
        self._buffer = buffer
        self._readonly_buffer = buffer.view()
        self._readonly_buffer.flags.writeable = False


class RequestKV:
    """The local sequences of one request, the one with the newest token last."""

    __slots__ = ("_local_lens", "_locals", "newest", "num_tokens")

    def __init__(self) -> None:
        self.num_tokens = 0
        self.newest: LocalSequence | None = None
        """The local sequence that holds token num_tokens - 1."""
        self._locals: dict[InstanceId, LocalSequence] = {}
        self._local_lens: tuple[tuple[InstanceId, int], ...] | None = None

    def __iter__(self) -> Iterator[LocalSequence]:
        return iter(self._locals.values())

    @property
    def instances(self) -> tuple[InstanceId, ...]:
        return tuple(self._locals)

    @property
    def local_lens(self) -> tuple[tuple[InstanceId, int], ...]:
        """(instance, tokens it holds) for each local sequence; the same tuple until one of them changes."""
        lens = self._local_lens
        if lens is None:
            lens = self._local_lens = tuple([(local.instance, local.num_tokens) for local in self._locals.values()])
        return lens

    def grow_to(self, num_tokens: int) -> None:
        """Notes that the local sequences now hold so many tokens."""
        self.num_tokens = num_tokens
        self._local_lens = None

    def find(self, instance: InstanceId) -> LocalSequence | None:
        return self._locals.get(instance)

    def find_or_add(self, instance: InstanceId) -> LocalSequence:
        local = self._locals.get(instance)
        if local is None:
            local = self._locals[instance] = LocalSequence(instance)
        return local

    def set_newest(self, local: LocalSequence) -> None:
        """Notes that this local sequence holds the newest token."""
        self._locals[local.instance] = self._locals.pop(local.instance)
        self.newest = local

    def tidy(self) -> None:
        """Restores the order, and drops empty local sequences, after tokens have moved between them."""
        by_newest_token = sorted(
            (max(end for _, end in local.intervals), instance)
            for instance, local in self._locals.items()
            if local.num_tokens
        )
        self._locals = {instance: self._locals[instance] for _, instance in by_newest_token}
        self.newest = self._locals[by_newest_token[-1][1]] if by_newest_token else None
        self._local_lens = None
