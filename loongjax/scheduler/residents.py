"""Which requests have keys on which instance, followed from one picture of the cluster to the next."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence

from loongjax.core.cluster import InstanceId
from loongjax.scheduler.queue import order_of
from loongjax.scheduler.view import RunningView

_NO_HOME: InstanceId = -1


class Residents:
    """The running requests of a view, by instance. A value: what has changed makes another one.

    Args:
        running: those of the view.
        num_instances: the cluster's.
    """

    def __init__(self, running: tuple[RunningView, ...], num_instances: int) -> None:
        self.running = running
        self._homes = _homes(running)
        by_instance: list[list[RunningView]] = [[] for _ in range(num_instances)]
        homeless: list[RunningView] = []
        for request, home in zip(running, self._homes, strict=True):
            (by_instance[home] if home != _NO_HOME else homeless).append(request)
        self.num_newest = list(map(len, by_instance))
        """Those whose newest token lies on each instance."""
        self.straddling: tuple[RunningView, ...] = tuple([request for request in homeless if request.kv])
        """Requests with keys on more than one instance."""
        for request in self.straddling:
            for instance, _ in request.kv:
                by_instance[instance].append(request)
            self.num_newest[request.kv[-1][0]] += 1
        self.by_instance = list(map(_oldest_first, by_instance))
        """Those with keys on each instance, oldest first."""

    @functools.cached_property
    def num_requests(self) -> int:
        """Those with keys anywhere."""
        return len(self.running) - self._homes.count(_NO_HOME) + len(self.straddling)

    @functools.cached_property
    def max_total_tokens(self) -> int:
        """What those with keys may become together."""
        return sum([request.max_total_tokens for request in self.running if request.kv])

    def after(self, running: tuple[RunningView, ...]) -> Residents:
        """Those of the next view of the same cluster.

        Views are made anew only if something changed, and mostly that is a token more of those that have just decoded:
        the others are not even looked at.
        """
        before = self.running
        if running is before:
            return self
        if len(running) != len(before):
            return Residents(running, len(self.by_instance))
        is_new = list(map(operator.is_not, before, running))
        changed = list(itertools.compress(running, is_new))
        homes = _homes(changed)
        is_as_before = (
            _NO_HOME not in homes
            and homes == list(itertools.compress(self._homes, is_new))
            and _orders(changed) == _orders(list(itertools.compress(before, is_new)))
        )
        if not is_as_before:
            return Residents(running, len(self.by_instance))
        following = object.__new__(Residents)
        following.__dict__.update(self.__dict__)
        following.running, following.by_instance = running, self.by_instance.copy()
        for instance in set(homes):
            news = {request.order: request for request, home in zip(changed, homes, strict=True) if home == instance}
            following.by_instance[instance] = tuple(
                [news.get(request.order, request) for request in self.by_instance[instance]]
            )
        return following


def _oldest_first(requests: list[RunningView]) -> tuple[RunningView, ...]:
    return tuple(sorted(requests, key=order_of))


def _orders(running: Sequence[RunningView]) -> list[int]:
    return [request.order for request in running]


def _homes(running: Sequence[RunningView]) -> list[InstanceId]:
    """The only instance with keys of each; none if there are several or no keys."""
    keys = [request.kv for request in running]
    try:
        return [instance for ((instance, _),) in keys]
    except ValueError:
        return [kv[0][0] if len(kv) == 1 else _NO_HOME for kv in keys]
