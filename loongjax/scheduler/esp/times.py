"""Predicted times, asked for in the scheduler's terms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from loongjax.core.cluster import Group
from loongjax.core.plan import Migrate
from loongjax.costmodel.model import CostModel
from loongjax.costmodel.work import DecodeTotals, DecodeWork, PrefillTotals, PrefillWork, Strategy
from loongjax.scheduler.view import ClusterView, FlightView, WaitingView


class Times:
    """A cost model for instances of `tp` devices."""

    def __init__(self, model: CostModel, tp: int) -> None:
        self._model = model
        self._tp = tp
        self._known_batches: dict[tuple[int, int, int], float] = {}
        self._known_steps: dict[tuple[int, int, int], float] = {}

    def prefill_s(self, dop: int, totals: PrefillTotals) -> np.ndarray:
        """Of many batches on so many instances each: float64, of the totals' shape."""
        return self._model.prefill_s(Strategy(dop, self._tp), totals)

    def batch_s(self, dop: int, requests: Sequence[WaitingView]) -> float:
        """Of these requests in one prefill; 0 of none."""
        if not requests:
            return 0.0
        lens = [request.num_tokens for request in requests]
        return self._batch_s(dop, sum(lens), sum([length * length for length in lens]))

    def least_prefill_s(self, dop: int) -> float:
        """Of a prefill that has next to nothing to do."""
        return self._batch_s(dop, 1, 1)

    def step_of_one_master_s(self, dop: int, num_rows: int, busiest_keys: int) -> float:
        """As `step_s`, for one master."""
        key = dop, num_rows, busiest_keys
        if key not in self._known_steps:
            self._known_steps[key] = float(self.step_s(dop, num_rows, busiest_keys, [1])[0])
        return self._known_steps[key]

    def step_s(self, dop: int, num_rows: int, busiest_keys: int, num_masters: Sequence[int]) -> np.ndarray:
        """Of a decode step whose rows are as even as they can be, for each number of masters: float64 [masters].

        Args:
            dop: instances of the group.
            num_rows: requests.
            busiest_keys: keys on the instance that holds most of them.
            num_masters: how many instances share the requests.
        """
        masters = np.asarray(num_masters, np.float64)
        totals = DecodeTotals(
            num_rows=np.full(len(masters), float(num_rows)),
            num_masters=masters,
            busiest_rows=np.ceil(num_rows / masters),
            busiest_keys=np.full(len(masters), float(busiest_keys)),
        )
        return self._model.decode_s(Strategy(dop, self._tp), totals)

    def migration_s(self, num_tokens: int | float) -> float:
        """Of moving so many tokens' keys from one instance to another."""
        return float(self._model.migration_s(num_tokens, self._tp)[0])

    def until_free_s(self, view: ClusterView) -> list[float]:
        """Seconds until what occupies each instance should be over: 0 if nothing does, inf while it recovers.

        What has taken longer than predicted is taken to need as long again as it is late: a model that is far off says
        little about the end, and whoever waited for one that is always imminent might wait all the time.
        """
        durations = self._durations(view.flights)
        ends: dict[Group, float] = {}
        for flight, duration_s in zip(view.flights, durations, strict=True):
            begin_s = max(flight.started_s, ends.get(flight.group, -math.inf))
            ends[flight.group] = view.now_s + abs(begin_s + duration_s - view.now_s)
        left = [0.0] * view.shape.num_instances
        for group, end_s in ends.items():
            for instance in group.instances:
                left[instance] = end_s - view.now_s
        return left

    def _batch_s(self, dop: int, num_tokens: int, squared_lens: int) -> float:
        key = dop, num_tokens, squared_lens
        if key not in self._known_batches:
            self._known_batches[key] = float(self.prefill_s(dop, PrefillTotals.of_sums(num_tokens, squared_lens))[0])
        return self._known_batches[key]

    def _durations(self, flights: Sequence[FlightView]) -> list[float]:
        durations = [math.inf] * len(flights)
        alike: dict[tuple[type, int], list[int]] = {}
        for index, flight in enumerate(flights):
            if isinstance(flight.plan, Migrate):
                durations[index] = self.migration_s(flight.plan.num_tokens)
            elif flight.work is not None:
                alike.setdefault((type(flight.work), flight.group.dop), []).append(index)
        for (kind, dop), indices in alike.items():
            works = [flights[index].work for index in indices]
            if kind is PrefillWork:
                totals = PrefillTotals.of([work for work in works if isinstance(work, PrefillWork)])
                seconds = self.prefill_s(dop, totals)
            else:
                totals = DecodeTotals.of([work for work in works if isinstance(work, DecodeWork)])
                seconds = self._model.decode_s(Strategy(dop, self._tp), totals)
            for index, duration_s in zip(indices, seconds.tolist(), strict=True):
                durations[index] = duration_s
        return durations
