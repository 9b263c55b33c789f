"""The frozen picture of the cluster that a policy decides on.

The engine builds one each time it asks, of views of requests that it makes anew only when something about them changed.
"""

from __future__ import annotations

import dataclasses

from loongjax.core.cluster import ClusterShape, Group, InstanceId
from loongjax.core.plan import Decode, Extend, Migrate, Prefill
from loongjax.core.request import NO_SLO, ServiceLevel
from loongjax.costmodel.work import DecodeWork, PrefillWork


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class InstanceView:
    """One elastic instance."""

    instance: InstanceId
    num_free_pages: int
    is_busy: bool
    """Whether an iteration occupies it. A policy plans only for instances that are not busy."""
    is_prefilling: bool
    """Whether that iteration is a prefill, which can last a thousand times longer than a decode step."""


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
class WaitingView:
    """A request that waits for its prefill: a new one, or one that was preempted."""

    request_id: str
    order: int
    """Its place in the order of arrival; kept across preemptions, different for every live request."""
    num_tokens: int
    """Tokens to prefill: the prompt, and after a preemption the tokens generated before it."""
    max_total_tokens: int
    """Prompt and longest possible output. The last output token never gets keys."""
    keeps_kv: bool
    """Whether it will decode after the prefill; False if `max_tokens` is 0."""
    is_suspect: bool = False
    """Whether the last iteration with it failed: it is computed alone until it gets a token, so that no other request
    shares the blame."""
    needs_whole_prefill: bool = False
    """Whether one `Prefill` has to take all its tokens: it keeps no keys, or wants its prompt's log-probabilities."""
    num_output_tokens: int = 0
    """Tokens generated so far; not 0 after a preemption."""
    arrival_s: float = 0.0
    """When it was accepted, on the engine's clock, in seconds."""
    priority: int = 0
    """Lower goes first."""
    slo: ServiceLevel = NO_SLO


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunningView:
    """A request that has keys in the pool, or is being prefilled."""

    request_id: str
    order: int
    """Its place in the order of arrival; kept across preemptions, different for every live request."""
    num_tokens: int
    """Tokens whose keys are in the pool, those of an iteration in flight included."""
    max_total_tokens: int
    """Prompt and longest possible output."""
    kv: tuple[tuple[InstanceId, int], ...]
    """(instance, tokens it holds), of which the last entry holds the newest token. See `KVCache.local_lens`."""
    is_in_flight: bool
    """Whether an iteration computes it now. A policy leaves such a request alone."""
    num_uncomputed_tokens: int = 1
    """Tokens that it knows and that have no keys, once what is in flight is over. More than 1: it is partly prefilled,
    which only an `Extend` does, and only another goes on with. 1: what comes next is its next token."""
    is_suspect: bool = False
    """As of a waiting request: the prompt of this one is partly computed, and each `Extend` with it is of it alone."""
    num_output_tokens: int = 0
    """Tokens generated so far."""
    arrival_s: float = 0.0
    """When it was accepted, on the engine's clock, in seconds."""
    first_token_s: float | None = None
    """When it got its first token, in seconds; None: not yet."""
    priority: int = 0
    """Lower goes first."""
    slo: ServiceLevel = NO_SLO


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ClusterView:
    """All that a policy knows."""

    shape: ClusterShape
    instances: tuple[InstanceView, ...]
    """Every instance, in ascending order."""
    waiting: tuple[WaitingView, ...]
    """In queue order: by priority, then by order of arrival."""
    running: tuple[RunningView, ...]
    """In any order."""
    max_num_batched_tokens: int
    """Tokens of one prefill on one instance; a group of n takes n times as many."""
    max_num_seqs: int
    """Requests of one sub-batch, and of one prefill."""
    now_s: float = 0.0
    """The engine's clock, in seconds."""
    flights: tuple[FlightView, ...] = ()
    """What every busy group does, in order of submission; at most two on a group, one after the other."""
