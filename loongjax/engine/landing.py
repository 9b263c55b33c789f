"""Iterations end: tokens for requests, or a failure and what has to be recomputed."""

from __future__ import annotations

import logging

from loongjax.core.iteration import Completion, ExtendIteration, PrefillIteration, RecoverIteration
from loongjax.core.plan import Migrate
from loongjax.core.request import FinishReason
from loongjax.engine.binding import Flight
from loongjax.engine.counters import Counters
from loongjax.engine.departure import Departure
from loongjax.engine.failures import MAX_FAILURES, blame, recovery_failed
from loongjax.engine.jumps import Jumps
from loongjax.engine.outcomes import Outcomes
from loongjax.engine.state import EngineState
from loongjax.engine.watch import Watch
from loongjax.errors import EngineDeadError
from loongjax.runtime.protocol import Runtime

logger = logging.getLogger(__name__)


class Landing:
    """Takes completions in."""

    def __init__(
        self,
        runtime: Runtime,
        state: EngineState,
        *,
        outcomes: Outcomes,
        counters: Counters,
        watch: Watch,
        departure: Departure,
        jumps: Jumps | None,
    ) -> None:
        self._runtime = runtime
        self._state = state
        self._outcomes = outcomes
        self._counters = counters
        self._watch = watch
        self._departure = departure
        self._jumps = jumps

    def take(self, completion: Completion) -> None:
        """An iteration is over, or the first steps of one.

        Raises:
            EngineDeadError: a recovery failed, and the engine has to end.
        """
        if not completion.is_over:
            self._pass_steps(self._state.flights.find(completion.iteration_id), completion)
            return
        flight = self._state.flights.land(completion.iteration_id, completion.elapsed_s)
        self._watch.note_landing(flight, self._runtime.now_s())
        if self._jumps is not None:
            self._jumps.end(flight)
        if isinstance(flight.iteration, RecoverIteration):
            if completion.error is not None:
                raise EngineDeadError(recovery_failed(flight.group, completion.error))
            return
        if flight.is_void:
            return
        self._state.roster.note(flight.requests)
        for live in flight.requests:
            live.num_in_flight -= not live.has_ended
        if completion.error is not None:
            self._fail(flight, completion.error)
            return
        if completion.num_steps > 1:
            self._grow(flight, completion.num_steps - 1)
        self._succeed(flight, completion)

    def _pass_steps(self, flight: Flight, completion: Completion) -> None:
        """Takes in steps of a decode that is in the next one now."""
        self._state.roster.note(flight.requests)
        self._grow(flight, completion.num_steps)
        self._succeed(flight, completion)
        flight.pass_steps(completion.num_steps, flight.submitted_s + completion.elapsed_s)

    def _grow(self, flight: Flight, num_tokens: int) -> None:
        """Gives the requests of a decode the slots of steps for which none were taken."""
        for live in flight.requests:
            if not live.has_ended:
                self._state.kv_cache.append_more(live.request_id, num_tokens)

    def _succeed(self, flight: Flight, completion: Completion) -> None:
        self._counters.record(flight, completion.num_steps)
        self._outcomes.note_steps(flight, completion)
        if isinstance(flight.plan, Migrate):
            return
        by_request = {token.request_id: token for token in completion.tokens}
        is_prefill = isinstance(flight.iteration, PrefillIteration)
        for live in flight.requests:
            if live.has_ended or (live.request_id not in by_request and isinstance(flight.iteration, ExtendIteration)):
                continue
            sampled = by_request[live.request_id]
            num_tokens = self._outcomes.give(live, sampled, is_prefill=is_prefill, num_steps=completion.num_steps)
            self._counters.num_generation_tokens += num_tokens

    def _fail(self, flight: Flight, error: str) -> None:
        """The keys on the group's instances are gone: everything that had some there starts again, and whatever was in
        flight there.

        A request that has failed too often ends alone, and devices that do not recover end the engine.
        """
        group, kv_cache = flight.group, self._state.kv_cache
        logger.warning("iteration %d on instances %s failed: %s", flight.iteration.iteration_id, group.instances, error)
        aloft = self._state.flights.void(group)
        participants = [live for live in flight.requests if not live.has_ended]
        for live in blame(participants):
            reason = f"{MAX_FAILURES} iterations in a row with it failed: {error}"
            self._outcomes.end(live, FinishReason.ERROR, reason)
        for request_id in kv_cache.request_ids:
            live = self._state.live[request_id]
            if live in participants or live in aloft or any(i in group for i in kv_cache.holders(request_id)):
                self._state.requeue(live)
        self._departure.recover(group)
