"""Sequence parallelism without elasticity: every iteration runs on all instances."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from loongjax.core.cluster import ClusterShape, Group
from loongjax.core.plan import Plan
from loongjax.scheduler.baselines.batching_config import BatchingConfig
from loongjax.scheduler.baselines.fixed_group import FixedGroup
from loongjax.scheduler.observation import Observation
from loongjax.scheduler.view import ClusterView

STATIC = BatchingConfig(reserves_max_tokens=True, min_decodes=10)
"""As in the reference's mode of fixed sequence parallelism."""


class StaticPolicy:
    """The paper's "LoongServe w/o ESP": one group of all instances, from start to end.

    Keys are spread evenly, a decode step has one master, and requests are let in every tenth step, if everybody could
    grow to its limit. Unlike the reference's, its count of reserved pages holds for all requests that run, and an
    instance that is full hands over to the next instead of stopping the group.
    """

    def __init__(self, shape: ClusterShape, config: BatchingConfig = STATIC) -> None:
        self._everything = FixedGroup(Group(shape.all_instances), config)

    def copy(self) -> StaticPolicy:
        """See `Policy.copy`."""
        other = copy.copy(self)
        other._everything = self._everything.copy()
        return other

    def observe(self, observations: Sequence[Observation]) -> None:
        """See `Policy.observe`."""
        self._everything.observe(observations)

    def plan(self, view: ClusterView) -> tuple[Plan, ...]:
        """See `Policy.plan`."""
        if not self._everything.is_idle(view):
            return ()
        return self._everything.plan(view, view.waiting, view.running)
