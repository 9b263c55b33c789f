"""Prefill and decode on instances of their own, as in DistServe."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

from loongjax.core.cluster import ClusterShape, Group, InstanceId
from loongjax.core.plan import Migrate, Plan, Prefill
from loongjax.errors import ConfigError
from loongjax.scheduler.baselines.admission import next_batch
from loongjax.scheduler.baselines.batching_config import BatchingConfig
from loongjax.scheduler.baselines.decoding import plan_decode
from loongjax.scheduler.baselines.even_placement import spread_keys
from loongjax.scheduler.baselines.line import Line
from loongjax.scheduler.baselines.router import Router
from loongjax.scheduler.observation import Observation
from loongjax.scheduler.request_view import RunningView
from loongjax.scheduler.view import ClusterView

DISAGGREGATED = BatchingConfig(reserves_max_tokens=False, watermark=0.01)


class DisaggregatedPolicy:
    """The first instances prefill, the others decode, and keys are handed over in between.

    A prompt waits for the prefill instance with the fewest tokens, in a line by priority and then by age (`Line`). Its
    keys stay there until a decode instance has room for them, pulled by the oldest first; the next prefill waits for
    the hand-over, unless no decode instance has room. A hand-over takes both instances for as long as it lasts. If a
    decode instance lacks a page for a next token, its newest request is preempted, and prefilled again. A request has
    to fit one instance of either kind.

    Args:
        shape: the cluster's.
        num_prefill_instances: how many prefill; None: half of them.
        config: what stays free on an instance that holds requests already.

    Raises:
        ConfigError: no instance is left for one of the two.
    """

    def __init__(
        self,
        shape: ClusterShape,
        num_prefill_instances: int | None = None,
        config: BatchingConfig = DISAGGREGATED,
    ) -> None:
        if shape.num_instances < 2:
            raise ConfigError(
                f"the policy disaggregated needs an instance for prefills and one for decodes, got "
                f"{shape.num_instances}: raise --num-instances"
            )
        count = shape.num_instances // 2 if num_prefill_instances is None else num_prefill_instances
        if not 0 < count < shape.num_instances:
            raise ConfigError(
                f"--num-prefill-instances must be from 1 to {shape.num_instances - 1}, so that instances are left to "
                f"decode, got {count}: half is {shape.num_instances // 2}"
            )
        self._config = config
        self._prefillers = shape.all_instances[:count]
        self._decoders = shape.all_instances[count:]
        self._router = Router(self._prefillers)
        self._lines = {instance: Line() for instance in self._prefillers}

    def copy(self) -> DisaggregatedPolicy:
        """See `Policy.copy`."""
        other = copy.copy(self)
        other._router = self._router.copy()
        other._lines = {instance: line.copy() for instance, line in self._lines.items()}
        return other

    def observe(self, observations: Sequence[Observation]) -> None:
        """Nothing is learned. See `Policy.observe`."""

    def plan(self, view: ClusterView) -> tuple[Plan, ...]:
        """See `Policy.plan`."""
        residents = [local.requests for local in view.residents.local]
        idle = {instance.instance for instance in view.instances if not instance.is_busy}
        plans: list[Plan] = list(self._hand_over(view, residents, idle))
        waiting = self._router.route(view)
        for instance in self._prefillers:
            if instance in idle and waiting[instance]:
                group = Group((instance,))
                line = self._lines[instance]
                batch = next_batch(view, group, line.in_order(waiting[instance]), residents[instance], self._config)
                if batch:
                    line.note_let_in(waiting[instance], batch)
                    free_pages = {instance: view.instances[instance].num_free_pages}
                    plans.append(Prefill(group, spread_keys(batch, free_pages, page_size=view.shape.page_size)))
        for instance in self._decoders:
            if instance in idle:
                plans += plan_decode(view, Group((instance,)), residents[instance])
        return tuple(plans)

    def _hand_over(
        self, view: ClusterView, residents: Sequence[Sequence[RunningView]], idle: set[InstanceId]
    ) -> list[Migrate]:
        """Migrations to start now; what they occupy, and sources that wait for a target to end its step, become busy.

        Memory goes to the oldest first, also if its source is still busy.
        """
        prefilled = [
            request for source in self._prefillers for request in residents[source] if not request.is_in_flight
        ]
        room = {target: self._room(view, target, residents[target]) for target in self._decoders}
        plans: list[Migrate] = []
        for request in sorted(prefilled, key=lambda request: request.order):
            ((source, num_tokens),) = request.kv
            num_pages = view.shape.num_pages_for(num_tokens)
            targets = [target for target in self._decoders if room[target] >= num_pages]
            if not targets:
                break
            target = max(targets, key=lambda target: (target in idle and source in idle, room[target], -target))
            room[target] -= num_pages
            if source in idle:
                idle.remove(source)
                if target in idle:
                    idle.remove(target)
                    plans.append(Migrate(request.request_id, source, target, num_tokens))
        return plans

    def _room(self, view: ClusterView, instance: InstanceId, residents: Sequence[RunningView]) -> int:
        """Pages that a decode instance may take: all but a page to grow into and the watermark, if it has requests."""
        num_free = view.instances[instance].num_free_pages
        if not residents:
            return num_free
        if len(residents) >= view.max_num_seqs:
            return 0
        return num_free - max(1, math.ceil(self._config.watermark * view.shape.num_pages))
