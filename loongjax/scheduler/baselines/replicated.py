"""Data parallelism: every instance serves requests of its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from loongjax.core.cluster import ClusterShape, Group
from loongjax.core.plan import Plan
from loongjax.scheduler.baselines.batching_config import BatchingConfig
from loongjax.scheduler.baselines.fixed_group import FixedGroup
from loongjax.scheduler.baselines.router import Router
from loongjax.scheduler.baselines.static import STATIC
from loongjax.scheduler.observation import Observation
from loongjax.scheduler.view import ClusterView


class ReplicatedPolicy:
    """Tensor parallelism alone: each instance is a replica that knows nothing of the others.

    Requests go to the replica with the fewest tokens when they arrive, and stay with it. Everything about one of them
    has to fit one instance (`loongjax.scheduler.build.max_request_tokens`). Batching is as in `StaticPolicy`.
    """

    def __init__(self, shape: ClusterShape, config: BatchingConfig = STATIC) -> None:
        self._replicas = [FixedGroup(Group((instance,)), config) for instance in shape.all_instances]
        self._router = Router(shape.all_instances)

    def copy(self) -> ReplicatedPolicy:
        """See `Policy.copy`."""
        other = copy.copy(self)
        other._replicas = [replica.copy() for replica in self._replicas]
        other._router = self._router.copy()
        return other

    def observe(self, observations: Sequence[Observation]) -> None:
        """See `Policy.observe`."""
        for replica in self._replicas:
            replica.observe(observations)

    def plan(self, view: ClusterView) -> tuple[Plan, ...]:
        """See `Policy.plan`."""
        waiting = self._router.route(view)
        plans: list[Plan] = []
        for replica in self._replicas:
            if replica.is_idle(view):
                (instance,) = replica.group.instances
                plans += replica.plan(view, waiting[instance], view.residents.local[instance].requests)
        return tuple(plans)
