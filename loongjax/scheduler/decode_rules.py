"""What a decode planner asks of a policy: when more masters pay, and when moving keys does."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from loongjax.core.cluster import InstanceId
from loongjax.scheduler.components import Component


@runtime_checkable
class DecodeRules(Protocol):
    """A policy's judgement of decode groups. An answer may depend on what changes slowly, so that groups stay as they
    are from step to step and the engine can run ahead."""

    def rows_per_master(self, component: Component) -> int:
        """Requests of one sub-batch before the next goes to another master, at least 1."""
        ...

    def wants_instance(self, component: Component) -> bool:
        """Whether one more master, without keys, is worth having for its computing."""
        ...

    def allows_memory_scale_up(self) -> bool:
        """Whether a group that lacks pages may take in another instance."""
        ...

    def is_worth_moving(self, component: Component, source: InstanceId, num_tokens: int) -> bool:
        """Whether moving this many tokens' keys, all that requests of several instances have on the source, to another
        instance of the group is worth its time, because the group can then do without the source."""
        ...

    @property
    def min_tokens_between_migrations(self) -> int:
        """Tokens that a request generates before its keys may be moved again."""
        ...
