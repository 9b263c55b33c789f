"""The frozen picture of the cluster that a policy decides on.

The engine builds one each time it asks, of views of requests that it makes anew only when something about them changed.
"""

from __future__ import annotations

import dataclasses

from loongjax.core.cluster import ClusterShape, Group, InstanceId
from loongjax.core.plan import Decode, Extend, Migrate, Prefill
from loongjax.costmodel.work import DecodeWork, PrefillWork
from loongjax.scheduler.request_view import RunningView
from loongjax.scheduler.residents import Residents
from loongjax.scheduler.waiting import Waiting


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class InstanceView:
    """One elastic instance."""

    instance: InstanceId
    num_free_pages: int
    is_busy: bool
    """Whether an iteration occupies it. A policy plans only for instances that are not busy."""
    is_prefilling: bool
    """Whether that iteration, or one before or behind it, is a prefill, which can last a thousand times longer than a
    decode step."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FlightView:
    """An iteration in flight."""

    plan: Prefill | Decode | Extend | Migrate | None
    """None: the group recovers from a failure."""
    group: Group
    work: PrefillWork | DecodeWork | None
    """What a prefill, an extend (in a prefill's terms) or a decode step has to do."""
    started_s: float
    """When it was submitted, or when the one before it on the same group ended if that came later."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ClusterView:
    """All that a policy knows."""

    shape: ClusterShape
    instances: tuple[InstanceView, ...]
    """Every instance, in ascending order."""
    waiting: Waiting
    """In queue order: by priority, then by order of arrival."""
    residents: Residents
    """Running requests, by the instances that hold their keys."""
    max_num_batched_tokens: int
    """Tokens of one prefill on one instance; a group of n takes n times as many."""
    max_num_seqs: int
    """Requests of one sub-batch, and of one prefill."""
    now_s: float = 0.0
    """The engine's clock, in seconds."""
    flights: tuple[FlightView, ...] = ()
    """What every busy group does, in order of submission; at most two on a group, one after the other."""

    @property
    def running(self) -> tuple[RunningView, ...]:
        """Running requests, each once, in any order."""
        return self.residents.running
