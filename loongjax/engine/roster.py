"""The running requests as a policy sees them."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from loongjax.core.cluster import InstanceId
from loongjax.engine.binding import Flight
from loongjax.engine.live_request import LiveRequest
from loongjax.kvcache.kv_cache import KVCache
from loongjax.scheduler.request_view import RunningView
from loongjax.scheduler.residents import LocalRequests, Residents


class Roster:
    """Follows what changes of running requests, so that a picture costs what has changed since the last one.

    Args:
        kv_cache: says who runs, and where the keys are.
        live: every live request, by id.
    """

    def __init__(self, kv_cache: KVCache, live: Mapping[str, LiveRequest]) -> None:
        self._kv_cache = kv_cache
        self._live = live
        self._residents = Residents.of((), kv_cache.shape.num_instances)
        self._views: dict[str, RunningView] = {}
        """Those in it, by request id."""
        self._changed: set[str] = set()
        """Request ids."""
        self._landed: weakref.WeakKeyDictionary[Flight, _Landed] = weakref.WeakKeyDictionary()

    def note(self, requests: Iterable[LiveRequest]) -> None:
        """Something about these may have changed, or is about to before the next picture."""
        self._changed.update([live.request_id for live in requests])

    def residents(self) -> Residents:
        """As they are."""
        if self._changed:
            news: dict[str, RunningView | None] = {}
            left: set[InstanceId] = set()
            for request_id in self._changed:
                before, now = self._views.pop(request_id, None), self._view(request_id)
                if now is not None:
                    self._views[request_id] = now
                if now is not before:
                    news[request_id] = now
                    left.update([instance for instance, _ in before.kv] if before is not None else ())
            self._residents = self._residents.after(news, left)
            self._changed.clear()
        return self._residents

    def residents_after(self, flight: Flight) -> Residents:
        """As they will be when a decode in flight is over, if that ends none but those that get their last token."""
        residents = self.residents()
        before = [residents.local[instance] for instance in flight.group.instances]
        landed = self._landed.get(flight)
        if landed is None or not all(map(operator.is_, before, landed.before)):
            kv_cache = self._kv_cache
            news = {
                live.request_id: live.running_view(kv_cache.local_lens(live.request_id), num_landed=1)
                if live.num_tokens_left > 0
                else None
                for live in flight.requests
            }
            after = residents.after(news, flight.group.instances)
            landed = self._landed[flight] = _Landed(before, [after.local[local.instance] for local in before])
        return residents.with_local(landed.after)

    def _view(self, request_id: str) -> RunningView | None:
        if request_id not in self._kv_cache:
            return None
        return self._live[request_id].running_view(self._kv_cache.local_lens(request_id))


class _Landed(NamedTuple):
    """Who has keys on the instances of a flight, and who will when it is over."""

    before: list[LocalRequests]
    after: list[LocalRequests]
