"""The running requests as a policy sees them."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Mapping, Sequence
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
        """Request ids, which a client may use again as soon as a request is dead."""
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
                kv = self._kv_cache.local_lens_or_none(request_id)
                now = None if kv is None else self._live[request_id].running_view(kv)
                before = self._views.pop(request_id, None)
                if now is not None:
                    self._views[request_id] = now
                if now is not before:
                    news[request_id] = now
                    left.update([instance for instance, _ in before.kv] if before is not None else ())
            self._residents = self._residents.after(news, left)
            self._changed.clear()
        return self._residents

    def foresee(self, flight: Flight) -> Foreseen:
        """How it will be when a flight is over, if it ends only those who get their last token by it."""
        residents, instances = self.residents(), flight.group.instances
        before = [residents.local[instance] for instance in instances]
        landed = self._landed.get(flight)
        if landed is None or not all(map(operator.is_, before, landed.before)):
            news: dict[str, RunningView | None] = {}
            ended: list[RunningView] = []
            for live in flight.requests:
                if live.has_ended:
                    continue
                view = self._views[live.request_id]
                gets_token = live.request_id not in flight.partial_ids
                if live.num_tokens_left > 0 or not gets_token:
                    news[live.request_id] = live.running_view(view.kv, num_landed=1, num_given=int(gets_token))
                else:
                    news[live.request_id] = None
                    ended.append(view)
            after = residents.after(news, instances)
            landed = _Landed(before, [after.local[instance] for instance in instances], ended)
            self._landed[flight] = landed
        keyless = None
        if residents.keyless:
            names = {live.request_id for live in flight.requests}
            keyless = tuple([view for view in residents.keyless if view.request_id not in names])
        return Foreseen(residents.with_local(landed.after, keyless), landed.ended)


class Foreseen(NamedTuple):
    """The running requests once an iteration is over."""

    residents: Residents
    ended: Sequence[RunningView]
    """Who runs no more, as they were."""


class _Landed(NamedTuple):
    """Who has keys on the instances of a flight, who will when it is over, and who ends then."""

    before: list[LocalRequests]
    after: list[LocalRequests]
    ended: list[RunningView]
