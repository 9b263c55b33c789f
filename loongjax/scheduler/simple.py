"""A policy without a cost model: prefills first where they fit, decodes with the rest, nobody waits for ever."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from loongjax.core.plan import Plan
from loongjax.scheduler.decode_planner import DecodePlanner
from loongjax.scheduler.draft import Draft
from loongjax.scheduler.fairness import Fairness
from loongjax.scheduler.observation import Observation
from loongjax.scheduler.simple_config import SimplePolicyConfig
from loongjax.scheduler.simple_prefill import PrefillPlanner
from loongjax.scheduler.simple_rules import ThresholdRules
from loongjax.scheduler.view import ClusterView


class SimplePolicy:
    """Elastic scheduling by thresholds.

    The degree of parallelism of a prefill follows the prompt's length; its keys stay on the fewest instances that can
    hold them; decode groups gain instances when they lack pages or have much to compute. Why every request ends:
    each prefill and each decode gives its requests a token, so it is enough that something always runs and nobody is
    passed over for ever. The oldest request is never preempted and gets the pages of younger ones; a running request
    lets a bounded number of prefills pass; a waiting one is overtaken a bounded number of times.
    """

    def __init__(self, config: SimplePolicyConfig | None = None) -> None:
        self._config = config or SimplePolicyConfig()
        self._fairness = Fairness(
            max_prefills_before_decode=self._config.max_prefills_before_decode,
            max_overtakes=self._config.max_overtakes,
        )

    def copy(self) -> SimplePolicy:
        """See `Policy.copy`."""
        other = copy.copy(self)
        other._fairness = self._fairness.copy()
        return other

    def observe(self, observations: Sequence[Observation]) -> None:
        """Nothing is learned. See `Policy.observe`."""

    def plan(self, view: ClusterView) -> tuple[Plan, ...]:
        """Plans for the instances that are not busy. See `Policy.plan`."""
        draft = Draft(view, self._config.growth_tokens)
        if not draft.idle:
            return ()
        if view.waiting:
            PrefillPlanner(draft, self._config, self._fairness).plan()
        if draft.idle:
            DecodePlanner(draft, ThresholdRules(self._config), self._fairness).plan()
        self._fairness.prune(view.residents, view.waiting)
        return draft.plans
