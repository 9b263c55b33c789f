"""What the engine counts."""

from __future__ import annotations

import collections
from collections.abc import Iterable

from loongjax.core.cluster import InstanceId
from loongjax.core.iteration import ExtendIteration
from loongjax.core.plan import Decode, Extend, Migrate, Prefill
from loongjax.core.request import Phase
from loongjax.engine.binding import Flight
from loongjax.engine.client import EngineStats
from loongjax.engine.live_request import LiveRequest


class Counters:
    """Grows with every iteration, and keeps each request's elastic history."""

    def __init__(self, *, kv_bytes_per_token: int) -> None:
        self._kv_bytes_per_token = kv_bytes_per_token
        self.prefill_dop: collections.Counter[int] = collections.Counter()
        self.decode_dop: collections.Counter[int] = collections.Counter()
        self.num_scale_ups = 0
        self.num_scale_downs = 0
        self.kv_migrated_bytes = 0
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.num_iterations = 0
        self.iteration_tokens: collections.Counter[int] = collections.Counter()
        """Prefill, decode and extend iterations, by their tokens rounded up to a power of two."""
        self.num_iteration_tokens = 0

    def stats(self) -> EngineStats:
        """What it has counted; the other fields are their defaults."""
        return EngineStats(
            prefill_dop=dict(self.prefill_dop),
            decode_dop=dict(self.decode_dop),
            num_scale_ups=self.num_scale_ups,
            num_scale_downs=self.num_scale_downs,
            kv_migrated_bytes=self.kv_migrated_bytes,
            num_preemptions=self.num_preemptions,
            num_prompt_tokens=self.num_prompt_tokens,
            num_generation_tokens=self.num_generation_tokens,
            num_iterations=self.num_iterations,
            iteration_tokens=dict(self.iteration_tokens),
            num_iteration_tokens=self.num_iteration_tokens,
        )

    def record(self, flight: Flight, num_steps: int = 1) -> None:
        """Counts an iteration that succeeded, or so many steps of a decode, before its tokens are handed out."""
        self.num_iterations += num_steps
        match flight.plan:
            case Prefill():
                self._record_prefill(flight, flight.plan)
            case Decode():
                self._record_decode(flight, flight.plan, num_steps)
            case Extend():
                self._record_extend(flight)
            case Migrate():
                self._record_migrate(flight, flight.plan)

    def _record_prefill(self, flight: Flight, plan: Prefill) -> None:
        group = plan.group
        self.prefill_dop[group.dop] += 1
        kept_by = {interval.instance for planned in plan.requests for interval in planned.kept}
        self.num_scale_downs += bool(kept_by) and len(kept_by) < group.dop
        num_tokens = 0
        for live, planned in zip(flight.requests, plan.requests, strict=True):
            if live.has_ended:
                continue
            num_tokens += live.num_tokens + (live.request.max_tokens > 0)
            keepers = tuple(sorted({interval.instance for interval in planned.kept}))
            live.record(Phase("prefill", group.instances, keepers, live.num_tokens))
            live.instances = keepers
            self._count_prompt(live)
        self._record_size(num_tokens)

    def _record_decode(self, flight: Flight, plan: Decode, num_steps: int) -> None:
        group = plan.group
        self.decode_dop[group.dop] += num_steps
        self.num_scale_ups += _num_joined(flight.requests, group.instances)
        phase = Phase("decode", group.instances, tuple(sorted(plan.masters)), num_steps)
        for live in flight.requests:
            if live.has_ended:
                continue
            live.record(phase)
            self._note_scaling(live, group.instances)
        self._record_size(sum(not live.has_ended for live in flight.requests), num_steps)

    def _record_extend(self, flight: Flight) -> None:
        """A generated token by itself is a decode to its request; anything else is a chunk of what it has."""
        assert isinstance(flight.iteration, ExtendIteration), flight.iteration
        instances = flight.group.instances
        live_by_id = {live.request_id: live for live in flight.requests if not live.has_ended}
        num_tokens = 0
        for item in flight.iteration.inputs:
            live = live_by_id.get(item.request.request_id)
            if live is None:
                continue
            is_decode = len(item.token_ids) == 1 and item.position >= len(item.request.prompt_token_ids)
            num_tokens += len(item.token_ids) + (item.is_sampled and not is_decode)
            live.record(Phase("decode" if is_decode else "extend", instances, instances, len(item.token_ids)))
            live.instances = instances
            self._count_prompt(live)
        self._record_size(num_tokens)

    def _count_prompt(self, live: LiveRequest) -> None:
        """Once, whatever is recomputed later."""
        if not live.has_been_prefilled:
            live.has_been_prefilled = True
            self.num_prompt_tokens += len(live.request.prompt_token_ids)

    def _record_size(self, num_tokens: int, num_steps: int = 1) -> None:
        """Notes the tokens of each step of an iteration, those of requests that ended meanwhile not counted."""
        self.num_iteration_tokens += num_tokens * num_steps
        self.iteration_tokens[1 << max(num_tokens - 1, 0).bit_length()] += num_steps

    def _note_scaling(self, live: LiveRequest, instances: tuple[InstanceId, ...]) -> None:
        if live.instances != instances:
            self.num_scale_downs += not set(live.instances) <= set(instances)
            live.instances = instances

    def _record_migrate(self, flight: Flight, plan: Migrate) -> None:
        self.kv_migrated_bytes += plan.num_tokens * self._kv_bytes_per_token
        for live in flight.requests:
            if not live.has_ended:
                live.record(Phase("migrate", flight.group.instances, (plan.target,), plan.num_tokens))
                live.instances = tuple(sorted({*live.instances, plan.target}))


def _num_joined(requests: Iterable[LiveRequest], instances: tuple[InstanceId, ...]) -> int:
    """How many instances, each with all that it is tied to, a decode has beyond the first that nothing tied to it: no
    request had instances of both, be it from its last decode, its prefill or a migration.
    """
    if len(instances) == 1:
        return 0
    parts = [{instance} for instance in instances]
    for before in {live.instances for live in requests}:
        tied = [part for part in parts if not part.isdisjoint(before)]
        if len(tied) > 1:
            parts = [part for part in parts if part.isdisjoint(before)]
            parts.append(set().union(*tied))
    return len(parts) - 1
