"""Which running requests have keys on which instance, followed from one picture of the cluster to the next."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from loongjax.core.cluster import InstanceId
from loongjax.scheduler.queue import order_of
from loongjax.scheduler.request_view import RunningView
from loongjax.scheduler.running import NOBODY, Running


class LocalRequests:
    """Those with keys on one instance. A value, the same in all pictures for as long as nothing about them changes.

    Args:
        instance: that one.
        requests: those, oldest first.
    """

    def __init__(self, instance: InstanceId, requests: Running = NOBODY) -> None:
        self.instance = instance
        self.requests = requests

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, LocalRequests) and (self.instance, self.requests) == (other.instance, other.requests)
        )

    def __hash__(self) -> int:
        return hash((self.instance, self.requests))

    @functools.cached_property
    def straddling(self) -> Running:
        """Those that have keys elsewhere, too."""
        return Running([request for request in self.requests if len(request.kv) > 1])

    @functools.cached_property
    def newest(self) -> Running:
        """Those whose newest token lies here."""
        if not self.straddling:
            return self.requests
        return Running([request for request in self.requests if request.kv[-1][0] == self.instance])


class Residents:
    """All running requests. A value: what has changed makes another one.

    Args:
        local: those with keys on each instance.
        keyless: those without keys anywhere, oldest first.
    """

    def __init__(self, local: Sequence[LocalRequests], keyless: tuple[RunningView, ...] = ()) -> None:
        self.local = tuple(local)
        self.keyless = keyless

    @classmethod
    def of(cls, running: Iterable[RunningView], num_instances: int) -> Residents:
        """These, in a cluster of so many instances."""
        nobody = cls([LocalRequests(instance) for instance in range(num_instances)])
        return nobody.after({request.request_id: request for request in running}, ())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Residents) and (self.local, self.keyless) == (other.local, other.keyless)

    def __hash__(self) -> int:
        return hash((self.local, self.keyless))

    def __len__(self) -> int:
        """How many requests there are."""
        return self.num_requests + len(self.keyless)

    @functools.cached_property
    def num_requests(self) -> int:
        """Those with keys."""
        return sum([len(local.newest) for local in self.local])

    @functools.cached_property
    def running(self) -> tuple[RunningView, ...]:
        """Each once, in any order."""
        return (*itertools.chain.from_iterable([local.newest for local in self.local]), *self.keyless)

    @functools.cached_property
    def straddling(self) -> Running:
        """Those with keys on more than one instance, oldest first."""
        found = {request.order: request for local in self.local for request in local.straddling}
        return Running([found[order] for order in sorted(found)])

    @property
    def max_total_tokens(self) -> int:
        """What those with keys may become together."""
        return sum([local.newest.max_total_tokens for local in self.local])

    @property
    def table(self) -> Int[np.ndarray, "3 requests"]:
        """See `Running.table`, of all requests with keys."""
        return np.concatenate([local.newest.table for local in self.local], axis=1)

    def is_anybody_older(self, order: int) -> bool:
        """Whether any of them came before the request of that order."""
        orders = [local.requests[0].order for local in self.local if local.requests]
        orders += [request.order for request in self.keyless[:1]]
        return min(orders, default=order) < order

    def after(self, news: Mapping[str, RunningView | None], left: Iterable[InstanceId]) -> Residents:
        """These when something has changed.

        Args:
            news: by request id, whoever has changed or come as it is now; None if it runs no more.
            left: every instance that had keys of anybody among them.
        """
        come: dict[InstanceId, list[RunningView]] = {instance: [] for instance in left}
        keyless: list[RunningView] = []
        shared: set[InstanceId] = set()
        """Instances with keys of who has come and has keys elsewhere, too."""
        for request in news.values():
            if request is not None:
                for instance, _ in request.kv:
                    come.setdefault(instance, []).append(request)
                if len(request.kv) > 1:
                    shared.update([instance for instance, _ in request.kv])
                elif not request.kv:
                    keyless.append(request)
        if keyless or self.keyless:
            keyless = _merged(self.keyless, news, keyless)
        changed: list[LocalRequests] = []
        for instance, requests in come.items():
            before = self.local[instance]
            local = LocalRequests(instance, Running(_merged(before.requests, news, requests)))
            if not (before.straddling or instance in shared):
                local.straddling = NOBODY
            changed.append(local)
        return self.with_local(changed, tuple(keyless))

    def with_local(self, changed: Iterable[LocalRequests], keyless: tuple[RunningView, ...] | None = None) -> Residents:
        """With others on some instances, and others without keys; None: the same."""
        local = list(self.local)
        for requests in changed:
            local[requests.instance] = requests
        return Residents(local, self.keyless if keyless is None else keyless)


def _merged(
    requests: Sequence[RunningView], news: Mapping[str, RunningView | None], come: list[RunningView]
) -> list[RunningView]:
    """Those of the requests that are not news, and who has come, oldest first."""
    merged = come + [request for request in requests if request.request_id not in news]
    merged.sort(key=order_of)
    return merged
