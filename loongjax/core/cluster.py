"""Elastic instances and the parallel groups they gather into."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

InstanceId = int
"""An elastic instance: a tensor-parallel group of devices, a replica of the weights, a part of the KV pool."""


@dataclasses.dataclass(frozen=True, order=True)
class Group:
    """A parallel group: a set of instances that run one iteration together.

    It is a set, listed in canonical (ascending) order, so that equal sets are equal values and share one mesh.
    """

    instances: tuple[InstanceId, ...]

    def __post_init__(self) -> None:
        assert self.instances, "a group has at least one instance"
        assert list(self.instances) == sorted(set(self.instances)), self.instances

    @classmethod
    def of(cls, instances: Iterable[InstanceId]) -> Group:
        """The group of these instances, given in any order."""
        return cls(tuple(sorted(set(instances))))

    @property
    def dop(self) -> int:
        """The degree of parallelism: how many instances."""
        return len(self.instances)

    def rank_of(self, instance: InstanceId) -> int:
        """The instance's position on the group's "sp" mesh axis."""
        return self.instances.index(instance)

    def __contains__(self, instance: InstanceId) -> bool:
        return instance in self.instances

    def isdisjoint(self, other: Group) -> bool:
        return set(self.instances).isdisjoint(other.instances)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterShape:
    """What the scheduler and the accounting need to know of the devices."""

    num_instances: int
    num_pages: int
    """Pages of the KV pool on each instance."""
    page_size: int
    """Tokens a page holds."""
    tp: int = 1
    """Devices of one instance."""

    @property
    def num_slots(self) -> int:
        """Tokens that one instance's part of the pool holds."""
        return self.num_pages * self.page_size

    def num_pages_for(self, num_tokens: int) -> int:
        """Pages that a dense sequence of this many tokens fills, the last one perhaps partly."""
        return -(-num_tokens // self.page_size)

    @property
    def all_instances(self) -> tuple[InstanceId, ...]:
        return tuple(range(self.num_instances))
