"""When the simple policy adds masters and moves keys: thresholds in requests and tokens."""

from __future__ import annotations

from loongjax.core.cluster import InstanceId
from loongjax.scheduler.components import Component
from loongjax.scheduler.simple_config import SimplePolicyConfig


class ThresholdRules:
    """`DecodeRules` of fixed numbers."""

    def __init__(self, config: SimplePolicyConfig) -> None:
        self._config = config

    def rows_per_master(self, component: Component) -> int:
        share = -(-len(component.requests) // len(component.instances))
        return max(self._config.max_requests_per_master, share)

    def wants_instance(self, component: Component) -> bool:
        return len(component.requests) > self._config.max_requests_per_master * len(component.instances)

    def allows_memory_scale_up(self) -> bool:
        return True

    def is_worth_moving(self, component: Component, source: InstanceId, num_tokens: int) -> bool:
        return num_tokens <= self._config.max_migrated_tokens

    @property
    def min_tokens_between_migrations(self) -> int:
        return self._config.min_tokens_between_migrations
