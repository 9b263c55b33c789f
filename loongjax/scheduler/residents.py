"""Which requests have keys on which instance, followed from one picture of the cluster to the next."""

from __future__ import annotations

import copy

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
        pairs = zip(self.running, running, strict=False)
        changed = [(old, new) for old, new in pairs if old is not new]
        if len(running) != len(self.running) or not all(_lies_alike(old, new) for old, new in changed):
            return Residents(running, len(self.by_instance))
        newer = {id(old): new for old, new in changed}
        following = copy.copy(self)
        following.running = running
        following.by_instance, following.oldest_first = self.by_instance.copy(), self.oldest_first.copy()
        for instance in {new.kv[0][0] for _, new in changed}:
            for lists in (following.by_instance, following.oldest_first):
                lists[instance] = tuple([newer.get(id(request), request) for request in lists[instance]])
        following.max_total_tokens += sum([new.max_total_tokens - old.max_total_tokens for old, new in changed])
        return following


def _lies_alike(old: RunningView, new: RunningView) -> bool:
    """Whether both have the same age, and all their keys on the same single instance."""
    return len(old.kv) == len(new.kv) == 1 and old.kv[0][0] == new.kv[0][0] and old.order == new.order
