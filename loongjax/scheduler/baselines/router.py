"""Which replica serves which request."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from loongjax.core.cluster import InstanceId
from loongjax.scheduler.request_view import WaitingView
from loongjax.scheduler.view import ClusterView


class Router:
    """Gives each new request to the replica with the fewest tokens in queue and pool, and never changes its mind.

    Of a prompt that is partly computed all tokens count, as those of one that waits do.
    """

    def __init__(self, replicas: Sequence[InstanceId]) -> None:
        self._replicas = tuple(replicas)
        self._replica_of: dict[str, InstanceId] = {}

    def copy(self) -> Router:
        """Another one with the same memories, which goes its own way from now on."""
        other = copy.copy(self)
        other._replica_of = self._replica_of.copy()
        return other

    def route(self, view: ClusterView) -> dict[InstanceId, list[WaitingView]]:
        """The waiting requests of each replica, in queue order."""
        self._forget_all_but(view)
        loads = dict.fromkeys(self._replicas, 0)
        for request in view.running:
            for instance, num_tokens in request.kv:
                if instance in loads:
                    loads[instance] += num_tokens + request.num_uncomputed_tokens - 1
        for request in view.waiting:
            if request.request_id in self._replica_of:
                loads[self._replica_of[request.request_id]] += request.num_tokens
        routed: dict[InstanceId, list[WaitingView]] = {replica: [] for replica in self._replicas}
        for request in view.waiting:
            replica = self._replica_of.get(request.request_id)
            if replica is None:
                replica = min(self._replicas, key=loads.__getitem__)
                self._replica_of[request.request_id] = replica
                loads[replica] += request.num_tokens
            routed[replica].append(request)
        return routed

    def _forget_all_but(self, view: ClusterView) -> None:
        if len(self._replica_of) > 2 * (len(view.waiting) + len(view.residents)):
            live = {request.request_id for requests in (view.waiting, view.running) for request in requests}
            self._replica_of = {name: replica for name, replica in self._replica_of.items() if name in live}
