"""What an elastic policy remembers from one question to the next, so that nobody waits for ever."""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterable, Sequence

from loongjax.core.cluster import InstanceId
from loongjax.scheduler.request_view import RunningView, WaitingView
from loongjax.scheduler.residents import Residents

_PRUNE_SLACK = 64
"""Requests that are remembered beyond twice those that live before the dead are looked for."""


class Fairness:
    """Counts how often somebody had to stand back.

    Args:
        max_prefills_before_decode: prefills that a running request lets pass before it is overdue.
        max_overtakes: times that later requests may be prefilled before the first one that is left waiting. `simple`
            counts each answer in which they are once, `esp` in part where that costs little (`note_overtaken`).
    """

    def __init__(self, *, max_prefills_before_decode: int, max_overtakes: int) -> None:
        self._max_prefills_before_decode = max_prefills_before_decode
        self._max_overtakes = max_overtakes
        self._num_prefills_passed: collections.Counter[str] = collections.Counter()
        self._num_overtakes: dict[str, float] = {}
        self._starved: set[str] = set()
        self._migrated_at: dict[str, int] = {}

    def copy(self) -> Fairness:
        """Another one with the same memories, which goes its own way from now on."""
        other = copy.copy(self)
        other._num_prefills_passed = self._num_prefills_passed.copy()
        other._num_overtakes = self._num_overtakes.copy()
        other._starved = self._starved.copy()
        other._migrated_at = self._migrated_at.copy()
        return other

    def is_overdue(self, request: RunningView) -> bool:
        """Whether a running request has let enough prefills pass."""
        return self._num_prefills_passed[request.request_id] >= self._max_prefills_before_decode

    def barred_instances(self, residents: Residents) -> set[InstanceId]:
        """Instances on which no prefill may start, because an overdue request needs them for its next token.

        All of them, if what an overdue request lacks is a page, which prefills would take.
        """
        limit = self._max_prefills_before_decode
        late = {name for name, count in self._num_prefills_passed.items() if count >= limit}
        barred: set[InstanceId] = set()
        if late:
            for request in residents.running:
                if request.request_id in late and not request.is_in_flight:
                    if request.request_id in self._starved:
                        return set(range(len(residents.local)))
                    barred.update(instance for instance, _ in request.kv)
        return barred

    def may_overtake(self, request: WaitingView) -> bool:
        """Whether later requests may be prefilled while this one, the first left waiting, is not."""
        return self._num_overtakes.get(request.request_id, 0) < self._max_overtakes

    def note_overtaken(self, request: WaitingView, count: float = 1.0) -> None:
        """Notes that later requests are prefilled before this one; a part of a time where that costs it little."""
        self._num_overtakes[request.request_id] = self._num_overtakes.get(request.request_id, 0.0) + count

    def note_prefilled(self, requests: Iterable[WaitingView]) -> None:
        """Notes that these requests wait no longer."""
        if self._num_overtakes:
            for request_id in self._num_overtakes.keys() & {request.request_id for request in requests}:
                del self._num_overtakes[request_id]

    def note_passed(self, requests: Iterable[RunningView]) -> None:
        """Notes that prefills started while these running requests stood back for them."""
        self._num_prefills_passed.update([request.request_id for request in requests])

    def note_starved(self, requests: Iterable[RunningView]) -> None:
        """Notes that these running requests lack a page for their next token."""
        self._starved.update(request.request_id for request in requests)

    def note_decoded(self, requests: Iterable[RunningView]) -> None:
        if self._num_prefills_passed or self._starved:
            for request in requests:
                self._num_prefills_passed.pop(request.request_id, None)
                self._starved.discard(request.request_id)

    def may_migrate(self, request: RunningView, min_new_tokens: int) -> bool:
        """Whether the request has grown by this much since its keys were last migrated."""
        if not self._migrated_at:
            return True
        return request.num_tokens >= self._migrated_at.get(request.request_id, -min_new_tokens) + min_new_tokens

    def note_migrated(self, request: RunningView) -> None:
        self._migrated_at[request.request_id] = request.num_tokens

    def prune(self, residents: Residents, waiting: Sequence[WaitingView]) -> None:
        """Forgets requests that are gone, once enough has been gathered to make it worth while."""
        memories = (self._num_prefills_passed, self._num_overtakes, self._migrated_at)
        most = max(len(self._starved), *map(len, memories))
        if most <= 2 * (len(residents) + len(waiting)) + _PRUNE_SLACK:
            return
        live = {request.request_id for request in residents.running} | {request.request_id for request in waiting}
        for memory in memories:
            for request_id in memory.keys() - live:
                del memory[request_id]
        self._starved &= live
