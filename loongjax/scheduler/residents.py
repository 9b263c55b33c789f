"""Which requests have keys on which instance, followed from one picture of the cluster to the next."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

from loongjax.core.cluster import InstanceId
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
        self.straddling: tuple[RunningView, ...] = tuple([request for request in running if len(request.kv) > 1])
        """Requests with keys on more than one instance."""
        self._orders = _orders(running)
        self._homes = _homes(running)
        self._places: list[list[int]] = [[] for _ in range(num_instances)]
        """In `running`, of those with keys on each instance."""
        for place in sorted(range(len(running)), key=self._orders.__getitem__):
            if (home := self._homes[place]) != _NO_HOME:
                self._places[home].append(place)
                continue
            for instance, _ in running[place].kv:
                self._places[instance].append(place)
        self.by_instance = [tuple(map(running.__getitem__, places)) for places in self._places]
        """Those with keys on each instance, oldest first."""
        self.num_newest = [len(places) for places in self._places]
        """Those whose newest token lies on each instance."""
        for request in self.straddling:
            for instance, _ in request.kv[:-1]:
                self.num_newest[instance] -= 1
        most = [request.max_total_tokens for request in running if request.kv]
        self.num_requests, self.max_total_tokens = len(most), sum(most)
        """Those with keys anywhere, and what they may become together."""

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
            and _orders(changed) == list(itertools.compress(self._orders, is_new))
        )
        if not is_as_before:
            return Residents(running, len(self.by_instance))
        following = object.__new__(Residents)
        following.__dict__.update(self.__dict__)
        following.running, following.by_instance = running, self.by_instance.copy()
        for instance in set(homes):
            following.by_instance[instance] = tuple(map(running.__getitem__, self._places[instance]))
        return following


def _orders(running: Sequence[RunningView]) -> list[int]:
    return [request.order for request in running]


def _homes(running: Sequence[RunningView]) -> list[InstanceId]:
    """The only instance with keys of each; none if there are several or no keys."""
    keys = [request.kv for request in running]
    try:
        return [instance for ((instance, _),) in keys]
    except ValueError:
        return [kv[0][0] if len(kv) == 1 else _NO_HOME for kv in keys]
