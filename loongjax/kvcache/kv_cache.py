"""Host accounting of the distributed KV pool: which slots of which instance hold which tokens of which request."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from loongjax.core.cluster import ClusterShape, InstanceId
from loongjax.core.iteration import InstanceTable, KeptTokens
from loongjax.core.plan import TokenInterval
from loongjax.kvcache.page_pool import PagePool
from loongjax.kvcache.request_kv import LocalSequence, RequestKV


class KVCache:
    """The pages of every instance, and the requests that hold them.

    On each instance a request's tokens form a dense local sequence (see `LocalSequence`); attention does not care in
    which order an instance holds them. Operations that can run out of pages change nothing when they do.
    """

    def __init__(self, shape: ClusterShape) -> None:
        self.shape = shape
        self._page_size = shape.page_size
        self._pools = [PagePool(instance, shape.num_pages) for instance in shape.all_instances]
        self._requests: dict[str, RequestKV] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    @property
    def request_ids(self) -> tuple[str, ...]:
        return tuple(self._requests)

    def free_pages(self, instance: InstanceId) -> int:
        return self._pools[instance].num_free

    def all_free_pages(self) -> list[int]:
        """Of every instance, in ascending order."""
        return [pool.num_free for pool in self._pools]

    def used_pages(self, instance: InstanceId) -> int:
        return self._pools[instance].num_used

    def num_tokens(self, request_id: str) -> int:
        return self._requests[request_id].num_tokens

    def holders(self, request_id: str) -> tuple[InstanceId, ...]:
        """Instances that hold tokens of the request; the one that holds the newest comes last."""
        return self._requests[request_id].instances

    def local_lens(self, request_id: str) -> tuple[tuple[InstanceId, int], ...]:
        """(instance, tokens it holds) for each holder; the one that holds the newest token comes last.

        The same tuple until it changes, so that `is` tells whether it did.
        """
        return self._requests[request_id].local_lens

    def local_lens_or_none(self, request_id: str) -> tuple[tuple[InstanceId, int], ...] | None:
        """Those of a request that may hold nothing."""
        request = self._requests.get(request_id)
        return None if request is None else request.local_lens

    def intervals(self, request_id: str) -> tuple[TokenInterval, ...]:
        """Which token lies where: in local order on each instance."""
        return tuple(
            TokenInterval(local.instance, begin, end)
            for local in self._requests[request_id]
            for begin, end in local.intervals
        )

    def tables(self, request_id: str) -> tuple[InstanceTable, ...]:
        """One table for each holder, the one with the newest token last.

        The page indices are read-only views: O(1) to make, and nothing that happens later changes them.
        """
        return tuple([local.table for local in self._requests[request_id]])

    def num_pages_needed(self, intervals: Sequence[TokenInterval]) -> dict[InstanceId, int]:
        """Pages that `keep` would take from each instance."""
        num_tokens: dict[InstanceId, int] = {}
        for interval in intervals:
            num_tokens[interval.instance] = num_tokens.get(interval.instance, 0) + interval.num_tokens
        return {instance: self.shape.num_pages_for(count) for instance, count in num_tokens.items()}

    def can_keep(self, *requests: Sequence[TokenInterval]) -> bool:
        """Whether there are pages for all of these, each the tokens of a request."""
        needed: collections.Counter[InstanceId] = collections.Counter()
        for intervals in requests:
            needed.update(self.num_pages_needed(intervals))
        return all(self._pools[instance].num_free >= num_pages for instance, num_pages in needed.items())

    def keep(self, request_id: str, intervals: Sequence[TokenInterval]) -> tuple[KeptTokens, ...]:
        """Takes in a request whose prefill leaves these tokens on these instances: one answer for each interval.

        Args:
            request_id: of a request that holds nothing yet.
            intervals: in token order from 0, without gaps; every boundary but the last is a page multiple. None at
                all for a request whose keys are not needed afterwards.

        Raises:
            OutOfPagesError: an instance has too few free pages; none is taken anywhere then.
        """
        assert request_id not in self._requests, request_id
        _check_tiling(intervals, self._page_size)
        needed = self.num_pages_needed(intervals)
        for instance, num_pages in needed.items():
            self._pools[instance].check_free(num_pages)
        request = self._requests[request_id] = RequestKV()
        for instance, num_pages in needed.items():
            request.find_or_add(instance).add_pages(self._pools[instance].allocate(num_pages))
        kept: list[KeptTokens] = []
        for interval in intervals:
            local = request.find_or_add(interval.instance)
            first = local.num_tokens
            local.add_interval(interval.begin, interval.end)
            request.set_newest(local)
            slots = local.slots(first, local.num_tokens, self._page_size)
            kept.append(KeptTokens(interval.instance, interval.begin, interval.end, slots))
        request.grow_to(intervals[-1].end if intervals else 0)
        return tuple(kept)

    def can_append(self, request_ids: Iterable[str], instance: InstanceId) -> bool:
        """Whether the instance has slots for the next tokens of these requests, one each."""
        local = [self._requests[request_id].find(instance) for request_id in request_ids]
        num_pages = sum([each is None or each.num_tokens % self._page_size == 0 for each in local])
        return num_pages <= self._pools[instance].num_free

    def append(self, request_id: str, instance: InstanceId) -> int:
        """Gives the request's next token a slot on this instance, and returns the slot.

        Raises:
            OutOfPagesError: the last page is full and the instance has no other.
        """
        request = self._requests[request_id]
        local = request.newest
        if local is None or local.instance != instance:
            local = self._newest_on(request, instance)
        offset = local.num_tokens % self._page_size
        if not offset:
            local.add_page(self._pools[instance].allocate_one())
        position = request.num_tokens
        local.add_interval(position, position + 1)
        request.grow_to(position + 1)
        return local.last_page * self._page_size + offset

    def append_more(self, request_id: str, num_tokens: int) -> None:
        """Gives the request's next tokens slots where its newest token lies, as many `append`s would.

        Raises:
            OutOfPagesError: the instance has too few free pages; nothing has changed then.
        """
        request = self._requests[request_id]
        local = request.newest
        assert local is not None, request_id
        num_new_pages = self.shape.num_pages_for(local.num_tokens + num_tokens)
        num_new_pages -= self.shape.num_pages_for(local.num_tokens)
        local.add_pages(self._pools[local.instance].allocate(num_new_pages))
        position = request.num_tokens
        local.add_interval(position, position + num_tokens)
        request.grow_to(position + num_tokens)

    def can_extend(self, num_tokens: Mapping[str, int], instance: InstanceId) -> bool:
        """Whether the instance, the only one that holds any of these requests, has slots for so many more tokens."""
        num_pages = 0
        for request_id, num_new in num_tokens.items():
            num_held = self._requests[request_id].num_tokens if request_id in self._requests else 0
            num_pages += self.shape.num_pages_for(num_held + num_new) - self.shape.num_pages_for(num_held)
        return num_pages <= self._pools[instance].num_free

    def extend(self, request_id: str, instance: InstanceId, num_tokens: int) -> np.ndarray:
        """Gives the request's next tokens slots on the only instance that may hold any of it.

        A request that is not here yet is taken in.

        Returns:
            The slots: int32 [num_tokens].

        Raises:
            OutOfPagesError: the instance has too few free pages; nothing has changed then.
        """
        assert num_tokens > 0, num_tokens
        request = self._requests.get(request_id)
        first = 0 if request is None else request.num_tokens
        num_new_pages = self.shape.num_pages_for(first + num_tokens) - self.shape.num_pages_for(first)
        pages = self._pools[instance].allocate(num_new_pages)
        if request is None:
            request = self._requests[request_id] = RequestKV()
        local = request.find_or_add(instance)
        assert local.num_tokens == first, f"{request_id} holds tokens elsewhere"
        local.add_pages(pages)
        local.add_interval(first, first + num_tokens)
        request.set_newest(local)
        request.grow_to(first + num_tokens)
        return local.slots(first, first + num_tokens, self._page_size)

    def _newest_on(self, request: RequestKV, instance: InstanceId) -> LocalSequence:
        local = request.find(instance)
        has_room = local is not None and local.num_tokens % self._page_size != 0
        if not has_room:
            self._pools[instance].check_free(1)
        local = request.find_or_add(instance)
        request.set_newest(local)
        return local

    def migrate(
        self, request_id: str, source: InstanceId, target: InstanceId, num_tokens: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Moves the last `num_tokens` of the source's local sequence to the end of the target's.

        Returns:
            Slots on the source and on the target, int32 [num_tokens] each, in the order of the source's sequence.
            The source's are free as soon as this returns: whatever writes to them must run after the copy.

        Raises:
            OutOfPagesError: the target has too few free pages; nothing has moved then.
        """
        assert source != target, source
        request = self._requests[request_id]
        departing = request.find(source)
        assert departing is not None, f"instance {source} holds no tokens of {request_id}"
        assert 0 < num_tokens <= departing.num_tokens, (num_tokens, departing.num_tokens)
        arriving = request.find(target)
        first = arriving.num_tokens if arriving is not None else 0
        num_new_pages = self.shape.num_pages_for(first + num_tokens) - self.shape.num_pages_for(first)
        self._pools[target].check_free(num_new_pages)
        arriving = request.find_or_add(target)
        arriving.add_pages(self._pools[target].allocate(num_new_pages))

        num_left = departing.num_tokens - num_tokens
        source_slots = departing.slots(num_left, departing.num_tokens, self._page_size)
        num_freed_pages = self.shape.num_pages_for(departing.num_tokens) - self.shape.num_pages_for(num_left)
        for begin, end in departing.remove_last_tokens(num_tokens):
            arriving.add_interval(begin, end)
        self._pools[source].release(departing.remove_last_pages(num_freed_pages))
        request.tidy()
        return source_slots, arriving.slots(first, first + num_tokens, self._page_size)

    def release(self, request_id: str) -> None:
        """Gives back everything that the request holds, and forgets it."""
        for local in self._requests.pop(request_id):
            self._pools[local.instance].release(local.page_indices)

    def check_integrity(self) -> None:
        """Asserts every invariant, deriving all of it anew from the local sequences."""
        num_holders = [np.zeros(self.shape.num_pages, np.int32) for _ in self._pools]
        for request_id, request in self._requests.items():
            _check_request(request_id, request, self._page_size)
            for local in request:
                np.add.at(num_holders[local.instance], local.page_indices, 1)
        for instance, pool in enumerate(self._pools):
            pool.check_integrity()
            assert pool.num_used + pool.num_free == self.shape.num_pages
            assert (num_holders[instance] == pool.num_holders()).all(), f"instance {instance}: references != holders"
            assert num_holders[instance].max(initial=0) <= 1, f"instance {instance}: two sequences hold a page"


def _check_tiling(intervals: Sequence[TokenInterval], page_size: int) -> None:
    position = 0
    for interval in intervals:
        assert interval.begin == position < interval.end, intervals
        assert position % page_size == 0, f"{intervals} has a boundary within a page of {page_size}"
        position = interval.end


def _check_request(request_id: str, request: RequestKV, page_size: int) -> None:
    spans: list[tuple[int, int]] = []
    for local in request:
        local.check_integrity(page_size)
        spans.extend((begin, end) for begin, end in local.intervals)
    position = 0
    for begin, end in sorted(spans):
        assert begin == position < end, f"{request_id}: {sorted(spans)} does not tile [0, {request.num_tokens})"
        position = end
    lens = tuple((local.instance, local.num_tokens) for local in request)
    assert request.local_lens == lens, f"{request_id}: {request.local_lens} are stale, {lens} are right"
    assert position == request.num_tokens, f"{request_id}: {position} tokens are placed of {request.num_tokens}"
    if request.num_tokens:
        *_, newest = request
        assert newest is request.newest, f"{request_id}: the newest token's holder is not last"
        assert max(end for _, end in newest.intervals) == request.num_tokens, request_id
