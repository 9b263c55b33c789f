"""Which requests have keys on which instance, followed from one picture of the cluster to the next."""

from __future__ import annotations

import copy
import itertools
import operator

from loongjax.core.cluster import InstanceId
from loongjax.scheduler.queue import oldest_first
from loongjax.scheduler.view import RunningView


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
        lists: list[list[RunningView]] = [[] for _ in range(num_instances)]
        for request in running:
            for instance, _ in request.kv:
                lists[instance].append(request)
        self.by_instance = [tuple(requests) for requests in lists]
        """Those with keys on each instance, in the view's order."""
        self.oldest_first = [oldest_first(requests) for requests in lists]
        """The same, by age."""
        self.num_newest = [len(requests) for requests in lists]
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
        if running is self.running:
            return self
        before = self.running
        places = list(itertools.compress(range(len(running)), map(operator.is_not, before, running)))
        if len(running) != len(before) or 2 * len(places) > len(running):
            return Residents(running, len(self.by_instance))
        newer: dict[int, RunningView] = {}
        instances: set[InstanceId] = set()
        max_total_tokens = self.max_total_tokens
        for place in places:
            old, new = before[place], running[place]
            if len(old.kv) != 1 or len(new.kv) != 1 or old.kv[0][0] != new.kv[0][0] or old.order != new.order:
                return Residents(running, len(self.by_instance))
            newer[id(old)] = new
            instances.add(new.kv[0][0])
            max_total_tokens += new.max_total_tokens - old.max_total_tokens
        following = copy.copy(self)
        following.running, following.max_total_tokens = running, max_total_tokens
        following.by_instance, following.oldest_first = self.by_instance.copy(), self.oldest_first.copy()
        for instance in instances:
            for lists in (following.by_instance, following.oldest_first):
                lists[instance] = tuple([newer.get(id(request), request) for request in lists[instance]])
        return following
