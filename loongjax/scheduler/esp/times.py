"""Predicted times, asked for in the scheduler's terms."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from loongjax.core.cluster import InstanceId
from loongjax.core.plan import Migrate
from loongjax.costmodel.corrector import Corrector, Kind
from loongjax.costmodel.model import CostModel
from loongjax.costmodel.work import DecodeWork, PrefillTotals, PrefillWork, Strategy
from loongjax.scheduler.esp.predictions import Predictions
from loongjax.scheduler.request_view import WaitingView
from loongjax.scheduler.view import ClusterView, FlightView


class PrefillsOnFirst(NamedTuple):
    """Times of the same batches on 1, 2, ... instances. Equal ones give equal times, whatever was learned meanwhile."""

    model: CostModel
    tp: int
    factors: tuple[float, ...]
    """What to multiply the model's times by."""

    def __call__(self, totals: PrefillTotals[np.ndarray], out: Float[np.ndarray, "dops _"]) -> None:
        """Writes them."""
        self.model.prefills_s(self.tp, totals, out)
        out *= np.array(self.factors)[:, None]


class Times:
    """A corrected cost model for instances of `tp` devices, while nothing is learned."""

    def __init__(
        self,
        model: CostModel,
        tp: int,
        *,
        corrector: Corrector | None = None,
        predictions: Predictions | None = None,
    ) -> None:
        """Times of this model.

        Args:
            model: knows every strategy that the cluster can form.
            tp: devices of an instance.
            corrector: what to multiply the times of iterations by; None: nothing.
            predictions: what the model was asked before; None: nothing.
        """
        self._model = model
        self.tp = tp
        self._predictions = Predictions(model) if predictions is None else predictions
        self._prefills = _Strategies("prefill", tp, corrector)
        self._decodes = _Strategies("decode", tp, corrector)
        self._on_first: dict[int, PrefillsOnFirst] = {}

    def on_first(self, num_instances: int) -> PrefillsOnFirst:
        """Those of prefills on 1, 2, ... so many instances."""
        known = self._on_first.get(num_instances)
        if known is None:
            factors = [self._prefills[dop][1] for dop in range(1, num_instances + 1)]
            known = self._on_first[num_instances] = PrefillsOnFirst(self._model, self.tp, tuple(factors))
        return known

    def batch_s(self, dop: int, requests: Sequence[WaitingView]) -> float:
        """Of these requests in one prefill; 0 of none."""
        lens = [request.num_tokens for request in requests]
        return self.batch_of_s(dop, sum(lens), sum([length * length for length in lens]))

    def least_prefill_s(self, dop: int) -> float:
        """Of a prefill that has next to nothing to do."""
        return self.batch_of_s(dop, 1, 1)

    def fixed_prefill_s(self, dop: int) -> float:
        """What two prefills with next to nothing to do take more than one."""
        return 2.0 * self.least_prefill_s(dop) - self.batch_of_s(dop, 2, 2)

    def least_step_s(self, dop: int) -> float:
        """Of a decode step that has next to nothing to do."""
        return self.step_s(dop, 1, 1)

    def step_s(self, dop: int, num_rows: int, busiest_keys: int, num_masters: int = 1) -> float:
        """Of a decode step whose rows are as even as they can be.

        Args:
            dop: instances of the group.
            num_rows: requests.
            busiest_keys: keys on the instance that holds most of them.
            num_masters: how many instances share the requests.
        """
        strategy, factor = self._decodes[dop]
        return factor * self._predictions.step_s(strategy, num_rows, busiest_keys, num_masters)

    def migration_s(self, num_tokens: int | float) -> float:
        """Of moving so many tokens' keys from one instance to another."""
        return self._predictions.migration_s(num_tokens, self.tp)

    def until_free_s(self, view: ClusterView) -> list[float]:
        """Seconds until what occupies each instance should be over: 0 if nothing does, inf while it recovers.

        What has taken longer than predicted is taken to need as long again as it is late: a model that is far off says
        little about the end, and whoever waited for one that is always imminent might wait all the time.
        """
        durations = self._durations(view.flights)
        now_s = view.now_s
        ends: dict[tuple[InstanceId, ...], float] = {}
        for flight, duration_s in zip(view.flights, durations, strict=True):
            instances = flight.group.instances
            begin_s = max(flight.started_s, ends.get(instances, -math.inf))
            ends[instances] = now_s + abs(begin_s + duration_s - now_s)
        left = [0.0] * view.shape.num_instances
        for instances, end_s in ends.items():
            for instance in instances:
                left[instance] = end_s - now_s
        return left

    def batch_of_s(self, dop: int, num_tokens: int, squared_lens: int) -> float:
        """Of one prefill, by the sums over its requests; 0 of nothing."""
        if not num_tokens:
            return 0.0
        strategy, factor = self._prefills[dop]
        return factor * self._predictions.prefill_s(strategy, num_tokens, squared_lens)

    def batches_of_s(
        self, dop: int, num_tokens: Float[np.ndarray, " batches"], squared_lens: Float[np.ndarray, " batches"]
    ) -> Float[np.ndarray, " batches"]:
        """Of each of these prefills, likewise."""
        strategy, factor = self._prefills[dop]
        return factor * self._predictions.prefills_s(strategy, num_tokens, squared_lens)

    def _durations(self, flights: Sequence[FlightView]) -> list[float]:
        durations = [math.inf] * len(flights)
        unknown: dict[tuple[Kind, int], list[int]] = {}
        for index, flight in enumerate(flights):
            work = flight.work
            if work is not None:
                kind, dop = kind_of(work), len(flight.group.instances)
                strategy, factor = (self._prefills if kind == "prefill" else self._decodes)[dop]
                base_s = self._predictions.known_s(strategy, work)
                if base_s is None:
                    unknown.setdefault((kind, dop), []).append(index)
                else:
                    durations[index] = factor * base_s
            elif isinstance(flight.plan, Migrate):
                durations[index] = self.migration_s(flight.plan.num_tokens)
        for (kind, dop), indices in unknown.items():
            strategy, factor = (self._prefills if kind == "prefill" else self._decodes)[dop]
            works = [work for index in indices if (work := flights[index].work) is not None]
            for index, base_s in zip(indices, self._predictions.of_works(strategy, works), strict=True):
                durations[index] = factor * base_s
        return durations


class _Strategies(dict[int, tuple[Strategy, float]]):
    """By the number of instances the strategy of a kind of iteration, and what to multiply its times by."""

    def __init__(self, kind: Kind, tp: int, corrector: Corrector | None) -> None:
        self._kind: Kind = kind
        self._tp = tp
        self._corrector = corrector

    def __missing__(self, dop: int) -> tuple[Strategy, float]:
        strategy = _strategy(dop, self._tp)
        factor = 1.0 if self._corrector is None else self._corrector.factor(self._kind, strategy)
        known = self[dop] = strategy, factor
        return known


_strategy = functools.cache(Strategy)
"""Equal ones are the same, made once."""


def kind_of(work: PrefillWork | DecodeWork) -> Kind:
    """As a corrector tells works apart: an extend counts as a prefill."""
    return "prefill" if isinstance(work, PrefillWork) else "decode"
