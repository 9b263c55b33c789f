"""Continuous batching on a group whose instances never change."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from loongjax.core.cluster import Group
from loongjax.core.plan import Decode, Plan, Prefill
from loongjax.scheduler.baselines.admission import next_batch
from loongjax.scheduler.baselines.batching_config import BatchingConfig
from loongjax.scheduler.baselines.decoding import masters_first, plan_decode
from loongjax.scheduler.baselines.even_placement import spread_keys
from loongjax.scheduler.baselines.line import Line
from loongjax.scheduler.observation import IterationEnded, Observation
from loongjax.scheduler.request_view import RunningView, WaitingView
from loongjax.scheduler.view import ClusterView


class FixedGroup:
    """One iteration after the other on one group: a prefill of who may come in, or a decode of everybody.

    Requests are let in by priority and then by age, and who is first in line is not overtaken. Why every one ends:
    the oldest that runs is never preempted and gets its share of the steps; if none runs, the first in line is let in,
    which the oldest becomes after a while (`Line`).
    """

    def __init__(self, group: Group, config: BatchingConfig) -> None:
        self.group = group
        self._config = config
        self._line = Line()
        self._num_prefills = 0
        """Since the last decode step."""
        self._num_decodes = config.min_decodes
        """Since the last prefill."""

    def copy(self) -> FixedGroup:
        """Another one with the same memories, which goes its own way from now on."""
        other = copy.copy(self)
        other._line = self._line.copy()
        return other

    def is_idle(self, view: ClusterView) -> bool:
        return not any(view.instances[instance].is_busy for instance in self.group.instances)

    def observe(self, observations: Sequence[Observation]) -> None:
        """Counts the iterations of this group. A step that ran ahead of the plans is counted like any other."""
        for observation in observations:
            if isinstance(observation, IterationEnded) and observation.plan.group == self.group:
                if isinstance(observation.plan, Decode):
                    self._num_decodes += 1
                    self._num_prefills = 0
                else:
                    self._num_decodes = 0
                    self._num_prefills += 1

    def plan(
        self, view: ClusterView, waiting: Sequence[WaitingView], running: Sequence[RunningView]
    ) -> tuple[Plan, ...]:
        """What the group, which is idle, does next.

        Args:
            view: the cluster.
            waiting: requests that wait for this group, in queue order.
            running: requests whose keys it holds, all of them.
        """
        may_prefill = self._num_decodes >= self._config.min_decodes and self._num_prefills < self._config.max_prefills
        if waiting and (may_prefill or not running):
            batch = next_batch(view, self.group, self._line.in_order(waiting), running, self._config)
            if batch:
                self._line.note_let_in(waiting, batch)
                free_pages = {instance: view.instances[instance].num_free_pages for instance in self.group.instances}
                by_preference = {instance: free_pages[instance] for instance in masters_first(running, free_pages)}
                return (Prefill(self.group, spread_keys(batch, by_preference, page_size=view.shape.page_size)),)
        return plan_decode(view, self.group, running)
