"""The ESP policy: dispatching, elastic allocation, batching and scaling, asked whenever a group completes.

There is no macro iteration. Each answer plans for the instances that are idle, and knows when the others should be:
where waiting for some of them pays, the idle ones are held until then. Every second comes from the cost model, which
is corrected by what iterations really take.

Why every request ends: each prefill and each decode gives its requests a token, so it is enough that something always
runs and nobody is passed over for ever. The first request of the queue is overtaken a bounded number of times, after
which nobody is prefilled before it and it is prefilled whatever it costs. The oldest request of all, if it waits,
counts as the first, and younger ones are preempted for it; it is never preempted itself. Any running one lets a bounded
number of prefills pass, after which none starts on its instances before it has decoded, not even that of the first of
the queue, which nobody overtakes meanwhile. Only the oldest request of all is prefilled there nevertheless, and of
requests older than one that runs there is an end. Instances are held only for others that are busy, so with nothing in
flight nothing is held.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence

from loongjax.core.plan import Plan
from loongjax.core.request import FinishReason
from loongjax.costmodel.corrector import Corrector, Kind
from loongjax.costmodel.model import CostModel
from loongjax.costmodel.work import Strategy
from loongjax.errors import ConfigError
from loongjax.scheduler.components import Component
from loongjax.scheduler.decode_planner import DecodePlanner
from loongjax.scheduler.draft import Draft
from loongjax.scheduler.esp.arrivals import Arrivals
from loongjax.scheduler.esp.batching import SplitMemory
from loongjax.scheduler.esp.candidates import Candidates
from loongjax.scheduler.esp.config import EspConfig
from loongjax.scheduler.esp.explain import Rehearsal, Sink
from loongjax.scheduler.esp.groups import GroupMemory
from loongjax.scheduler.esp.output_lengths import OutputLengths
from loongjax.scheduler.esp.predictions import Predictions
from loongjax.scheduler.esp.prefill import PrefillPlanner
from loongjax.scheduler.esp.scaling import CostModelRules
from loongjax.scheduler.esp.times import Times, kind_of
from loongjax.scheduler.fairness import Fairness
from loongjax.scheduler.observation import IterationEnded, Observation, RequestEnded
from loongjax.scheduler.view import ClusterView
from loongjax.scheduler.waiting import Waiting


class EspPolicy:
    """Elastic sequence parallelism by predicted times. See `loongjax.scheduler.policy.Policy`.

    Args:
        config: what the cost model cannot say.
        cost_model: knows every strategy that the cluster can form. Without migration times no keys are moved.
        explain: is given every decision; those of a copy are marked, and given once more if the copy is followed.
    """

    def __init__(self, config: EspConfig, cost_model: CostModel, *, explain: Sink | None = None) -> None:
        self._config = config
        self._base_model = cost_model
        self._corrector = Corrector()
        self._predictions = Predictions(cost_model)
        self._times: Times | None = None
        """Those of the last view, while nothing is learned."""
        self._can_migrate = _knows_migration(cost_model)
        self._explain = explain
        self._lengths = OutputLengths()
        self._queue = Waiting()
        self._arrivals = Arrivals()
        self._candidates = Candidates(config.max_picked + config.max_lookahead, config.implied_ttft_s)
        self._groups = GroupMemory(config.implied_tpot_s)
        self._splits = SplitMemory()
        self._fairness = Fairness(
            max_prefills_before_decode=config.max_prefills_before_decode, max_overtakes=config.max_overtakes
        )

    def copy(self) -> EspPolicy:
        """See `Policy.copy`. It costs next to nothing: what is learned is replaced and never changed."""
        other = copy.copy(self)
        other._fairness = self._fairness.copy()
        other._lengths = self._lengths.copy()
        if self._explain is not None:
            other._explain = Rehearsal(self._explain)
        return other

    def note_followed(self) -> None:
        """See `ExplainedPolicy.note_followed`."""
        if isinstance(self._explain, Rehearsal):
            self._explain = self._explain.follow()

    def predicted_over_actual(self) -> Mapping[tuple[Kind, Strategy], float]:
        """See `PredictingPolicy.predicted_over_actual`."""
        return self._corrector.predicted_over_actual()

    def observe(self, observations: Sequence[Observation]) -> None:
        """Corrects the cost model, and learns how long outputs are. See `Policy.observe`."""
        self._corrector, self._times = self._corrector.copy(), None
        self._correct([ended for ended in observations if isinstance(ended, IterationEnded)])
        for observation in observations:
            if isinstance(observation, RequestEnded) and observation.finish_reason in (
                FinishReason.STOP,
                FinishReason.LENGTH,
            ):
                self._lengths.add(observation.num_output_tokens)

    def plan(self, view: ClusterView) -> tuple[Plan, ...]:
        """Plans for the instances that are not busy. See `Policy.plan`."""
        if view.waiting is not self._queue:  # the engine shows the same tuple until its queue changes
            self._queue, self._arrivals = view.waiting, self._arrivals.after(view.waiting)
        draft = Draft(view, self._config.growth_tokens)
        if not draft.idle:
            return ()
        times = self._times_of(view.shape.tp)
        components = None
        if view.waiting:
            components = PrefillPlanner(
                draft,
                times,
                config=self._config,
                fairness=self._fairness,
                lengths=self._lengths,
                arrivals=self._arrivals,
                candidates=self._candidates,
                groups=self._groups,
                splits=self._splits,
                can_migrate=self._can_migrate,
                explain=self._explain,
            ).plan()
        if components is not None and (draft.has_preempted or _are_changed(components, draft)):
            components = None
        if draft.idle:
            rules = CostModelRules(
                times,
                self._config,
                self._lengths,
                can_migrate=self._can_migrate,
                has_waiting=bool(view.waiting),
                now_s=view.now_s,
                explain=self._explain,
            )
            DecodePlanner(draft, rules, self._fairness, components).plan()
        self._fairness.prune(view.residents, view.waiting)
        return draft.plans

    def _times_of(self, tp: int) -> Times:
        if self._times is None or self._times.tp != tp:
            self._times = Times(self._base_model, tp, corrector=self._corrector, predictions=self._predictions)
        return self._times

    def _correct(self, iterations: Sequence[IterationEnded]) -> None:
        """In order, for strategies learn from each other."""
        for (kind, strategy), alike in itertools.groupby(
            iterations, lambda ended: (kind_of(ended.work), ended.strategy)
        ):
            run = list(alike)
            predicted_s = self._predictions.of_works(strategy, [ended.work for ended in run])
            self._corrector.observe_all(kind, strategy, predicted_s, [ended.elapsed_s for ended in run])


def _are_changed(components: Sequence[Component], draft: Draft) -> bool:
    """Whether prefills of this answer took instances of decode groups."""
    return draft.has_prefills and any(not draft.prefilling.isdisjoint(group.instances) for group in components)


def _knows_migration(model: CostModel) -> bool:
    try:
        model.migration_s(1, 1)
    except ConfigError:
        return False
    return True
