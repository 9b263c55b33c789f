"""Plans become iterations in flight."""

from __future__ import annotations

import logging

from loongjax.core.cluster import Group
from loongjax.core.iteration import RecoverIteration
from loongjax.core.plan import Decode, Extend, Migrate, Plan, Preempt, Prefill
from loongjax.engine.binding import Flight, bind
from loongjax.engine.counters import Counters
from loongjax.engine.state import EngineState
from loongjax.runtime.protocol import Runtime

logger = logging.getLogger(__name__)


class Departure:
    """Binds plans to pages and submits them; iterations are numbered in order of submission."""

    def __init__(self, runtime: Runtime, state: EngineState, counters: Counters) -> None:
        self._runtime = runtime
        self._state = state
        self._counters = counters
        self._num_submitted = 0

    def carry_out(self, plan: Plan) -> None:
        """Does what a policy has decided, which keeps to the contract of `Policy.plan`."""
        if not isinstance(plan, Preempt):
            self._submit(plan)
            return
        logger.debug("%s", plan)
        for request_id in plan.request_ids:
            self._counters.num_preemptions += 1
            self._state.requeue(self._state.live[request_id])

    def recover(self, group: Group) -> None:
        """Submits what follows a failure on a group."""
        iteration = RecoverIteration(self._num_submitted, group)
        self._num_submitted += 1
        self._state.flights.depart(Flight(iteration, None, ()), self._runtime.now_s())
        self._runtime.submit(iteration)

    def _submit(self, plan: Prefill | Decode | Extend | Migrate) -> None:
        state = self._state
        flight = bind(
            plan,
            iteration_id=self._num_submitted,
            live=state.live,
            kv_cache=state.kv_cache,
            continues=isinstance(plan, Decode) and state.flights.continues(plan),
        )
        self._num_submitted += 1
        state.roster.note(flight.requests)
        for live in flight.requests:
            live.num_in_flight += 1
            if isinstance(plan, Prefill | Extend) and live in state.waiting:
                state.waiting.remove(live)
                live.note_prefill(self._runtime.now_s())
        state.flights.depart(flight, self._runtime.now_s())
        logger.debug("iteration %d: %s", flight.iteration.iteration_id, plan)
        self._runtime.submit(flight.iteration)
