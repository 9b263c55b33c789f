"""What a policy sees of requests."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from loongjax.core.cluster import InstanceId
from loongjax.core.request import NO_SLO, ServiceLevel


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


class RunningView(NamedTuple):
    """A request that has keys in the pool, or is being prefilled.

    A named tuple, for each step of a decode makes one of each of its requests.
    """

    request_id: str
    order: int
    """Its place in the order of arrival; kept across preemptions, different for every live request."""
    num_tokens: int
    """Tokens whose keys are in the pool, those of an iteration in flight included."""
    max_total_tokens: int
    """Prompt and longest possible output."""
    max_output_tokens: int
    """Longest possible output; a token less while two steps with it are in flight."""
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
