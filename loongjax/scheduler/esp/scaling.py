"""Step 4 of the paper for decodes: when masters join for computing, and when moving keys lets an instance go.

Scale-down of prefills is `loongjax.scheduler.placement`; which master takes which request, and scale-up for memory, is
`loongjax.scheduler.decode_planner`, which asks these rules.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from loongjax.core.cluster import InstanceId
from loongjax.scheduler.components import Component
from loongjax.scheduler.esp.config import EspConfig
from loongjax.scheduler.esp.explain import Decision, Sink
from loongjax.scheduler.esp.output_lengths import OutputLengths
from loongjax.scheduler.esp.times import Times
from loongjax.scheduler.running import Running


class CostModelRules:
    """`DecodeRules` of predicted step times; no number of requests is a threshold here.

    A change pays if what it saves in the steps that the group is expected to take still exceeds the time of the
    migration that it needs now, or that undoing it will need.
    """

    def __init__(
        self,
        times: Times,
        config: EspConfig,
        lengths: OutputLengths,
        *,
        can_migrate: bool,
        has_waiting: bool,
        now_s: float,
        explain: Sink | None,
    ) -> None:
        self._times = times
        self._config = config
        self._lengths = lengths
        self._can_migrate = can_migrate
        self._has_waiting = has_waiting
        self._now_s = now_s
        self._explain = explain

    @property
    def min_tokens_between_migrations(self) -> int:
        return self._config.min_tokens_between_migrations

    def rows_per_master(self, component: Component) -> int:
        """An even share for as many masters as make the step shortest."""
        num_rows, dop = len(component.requests), len(component.instances)
        if dop == 1:
            return num_rows
        steps_s = self._steps_s(dop, num_rows, _busiest_keys(component.requests), min(dop, num_rows))
        return -(-num_rows // (1 + steps_s.index(min(steps_s))))

    def wants_instance(self, component: Component) -> bool:
        """Where computing bounds the step, one more master shortens it. While requests wait, idle instances are theirs.

        gain = steps still expected x (step of k instances - step of k + 1), cost = moving the new master's keys back.
        """
        if not self._config.scale_up or self._has_waiting or len(component.requests) <= len(component.instances):
            return False
        num_rows, dop = len(component.requests), len(component.instances)
        busiest_keys = _busiest_keys(component.requests)
        now_s = min(self._steps_s(dop, num_rows, busiest_keys, dop))
        then_s = self._times.step_s(dop + 1, num_rows, busiest_keys, dop + 1)
        if then_s >= now_s:
            return False
        num_steps = self._steps_left(component.requests)
        gain = num_steps * (now_s - then_s)
        num_new_keys = num_steps * -(-num_rows // (dop + 1))
        cost = self._times.migration_s(num_new_keys) if self._can_migrate else 0.0
        self._tell("scale-up", component.instances, gain, cost, num_steps, now_s, then_s)
        return gain > cost

    def allows_memory_scale_up(self) -> bool:
        return self._config.scale_up

    def is_worth_moving(self, component: Component, source: InstanceId, num_tokens: int) -> bool:
        """gain = steps still expected x (step of k instances - step of k - 1), cost = moving the keys now."""
        if not self._can_migrate:
            return False
        num_rows, dop = len(component.requests), len(component.instances)
        busiest_keys = _busiest_keys(component.requests)
        now_s = min(self._steps_s(dop, num_rows, busiest_keys, dop))
        then_s = min(self._steps_s(dop - 1, num_rows, busiest_keys + num_tokens, dop - 1))
        if then_s >= now_s:
            return False
        num_steps = self._steps_left(component.requests)
        gain = num_steps * (now_s - then_s)
        cost = self._times.migration_s(num_tokens)
        self._tell("scale-down", (source,), gain, cost, num_steps, now_s, then_s)
        return gain > cost

    def _steps_s(self, dop: int, num_rows: int, busiest_keys: int, most: int) -> list[float]:
        """Of 1, 2, ... up to so many masters."""
        return [self._times.step_s(dop, num_rows, busiest_keys, number) for number in range(1, most + 1)]

    def _steps_left(self, requests: Running) -> float:
        """Steps until half of the requests' expected tokens are generated, at least one: the mean over requests."""
        return max(1.0, float(np.mean(self._lengths.expected_left(*requests.outputs))))

    def _tell(
        self,
        step: Literal["scale-up", "scale-down"],
        instances: set[InstanceId] | tuple[InstanceId, ...],
        gain: float,
        cost: float,
        num_steps: float,
        step_s: float,
        step_then_s: float,
    ) -> None:
        if self._explain is not None:
            self._explain(
                Decision(
                    now_s=self._now_s,
                    step=step,
                    is_taken=gain > cost,
                    gain=gain,
                    cost=cost,
                    instances=tuple(sorted(instances)),
                    terms=(
                        ("num_steps", num_steps),
                        ("step_s", step_s),
                        ("step_then_s", step_then_s),
                        ("migration_s", cost),
                    ),
                )
            )


def _busiest_keys(requests: Running) -> int:
    """Keys on the instance that holds most of them."""
    num_keys: dict[InstanceId, int] = {}
    for request in requests:
        for instance, count in request.kv:
            num_keys[instance] = num_keys.get(instance, 0) + count
    return max(num_keys.values())
