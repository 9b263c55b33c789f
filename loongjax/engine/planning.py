"""When the policy is asked, and what becomes of its answers.

Running ahead: while an iteration is in flight, the policy is also asked what it would do once that is over. If the
answer is one of these on its group and nothing else, it is submitted behind it at once, before any token was read, so
that the devices pass from one to the other without a pause:

    behind a decode    the same again, or what is left of it when some have ended; a prefill; an extend
    behind a prefill   a decode, that of those who were prefilled included
    behind an extend   an extend; a decode

The devices hold the input tokens. A request that turns out to have ended ignores its token of that iteration, and
whoever comes meanwhile waits for one iteration more. Behind a prefill no other is submitted, a long one is neither
behind anything nor followed (`LONGEST_AHEAD`), and among several instances none is while somebody else waits: those who
come meanwhile belong into the next batch, and what becomes free meanwhile may serve it. Any other answer
about a decode is kept, and followed when that is over if all has come as foreseen, so that no instance stands still
while the policy thinks.

Jumps, in simulations, are the same question for many steps: see `loongjax.engine.jumps`.
"""

from __future__ import annotations

from loongjax.core.plan import Decode, Extend, Prefill
from loongjax.engine.advice import Advice
from loongjax.engine.binding import Flight
from loongjax.engine.departure import Departure
from loongjax.engine.jumps import Jumps, Surroundings, longest_jump
from loongjax.engine.landing import Landing
from loongjax.engine.outcomes import Outcomes
from loongjax.engine.state import EngineState
from loongjax.errors import EngineError


class Planning:
    """Fills idle instances with what the policy decides."""

    def __init__(
        self,
        state: EngineState,
        advice: Advice,
        *,
        outcomes: Outcomes,
        departure: Departure,
        landing: Landing,
        run_ahead: bool,
        jumps: Jumps | None,
    ) -> None:
        """`run_ahead`: whether iterations are submitted behind others; `jumps`: instead of that, in a simulation."""
        self._state = state
        self._advice = advice
        self._outcomes = outcomes
        self._departure = departure
        self._landing = landing
        self._run_ahead = run_ahead and jumps is None
        self._jumps = jumps
        self._unlike: set[int] = set()
        """Iterations behind which nothing could be submitted when the policy was asked last."""

    def plan(self) -> bool:
        """Asks the policy, and does what it says.

        Returns:
            Whether there is more to plan at once.

        Raises:
            EngineError: the policy plans nothing, and never would.
        """
        state = self._state
        is_any_over = bool(len(state.waiting)) and self._catch_up(stop=False)
        self._advice.observe(self._outcomes.take_observations())
        if state.idle_instances and state.has_request_out_of_flight:
            for plan in self._advice.plans():
                self._departure.carry_out(plan)
        if self._run_ahead:
            self._run_ahead_of(state.flights.lone())
        if self._jumps is not None:
            is_any_over |= self._jump(self._jumps)
        if state.live and not (state.flights or is_any_over):
            raise EngineError(
                f"the policy plans nothing, though nothing is in flight and {len(state.live)} requests live"
            )
        return is_any_over

    def _run_ahead_of(self, flights: list[Flight]) -> None:
        """Submits what follows each of these; asks last about those that nothing could follow, for what is submitted
        meanwhile changes the answer. What follows a prefill or an extend is asked once: it may be in flight for long.
        """
        unlike, self._unlike = self._unlike, set()
        for flight in sorted(flights, key=lambda flight: flight.iteration.iteration_id in unlike):
            is_asked = isinstance(flight.plan, Prefill | Extend) and flight.iteration.iteration_id in unlike
            if is_asked or not self._submit_behind(flight):
                self._unlike.add(flight.iteration.iteration_id)

    def _submit_behind(self, flight: Flight) -> bool:
        """Submits what the policy would decide once the flight is over, if it can be behind it."""
        if flight.is_void:
            return False
        plan = self._advice.follows(flight)
        if plan is None:
            return False
        self._departure.carry_out(plan)
        return True

    def _jump(self, jumps: Jumps) -> bool:
        """Lets decodes stand for as many steps as nobody could interfere with; whether any has ended by that."""
        state = self._state
        surroundings = Surroundings(
            idle=state.idle_instances,
            left=frozenset([live.request_id for live in state.live.values() if live.num_in_flight == 0]),
        )
        is_any_over = False
        if len(state.waiting) or not jumps.hold(surroundings):
            is_any_over = self._catch_up(stop=True)
        if is_any_over or len(state.waiting):
            return is_any_over
        for flight in state.flights:
            plan = flight.plan
            if isinstance(plan, Decode) and not flight.is_void and flight not in jumps:

                def would_repeat(num_steps: int, flight: Flight = flight, plan: Decode = plan) -> bool:
                    return self._advice.would_repeat(flight, plan, num_steps)

                jumps.start(flight, longest_jump(flight, state.kv_cache, would_repeat), surroundings)
        return False

    def _catch_up(self, *, stop: bool) -> bool:
        """Takes in what decodes of many steps have done; whether one is over by that, and its instances are idle."""
        completions = self._jumps.catch_up(stop=stop) if self._jumps is not None else []
        for completion in completions:
            self._landing.take(completion)
        return any(completion.is_over for completion in completions)
