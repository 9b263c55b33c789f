"""What the policy says: of the cluster as it is, and of the cluster as it will be once a decode is over."""

from __future__ import annotations

from collections.abc import Sequence

from loongjax.core.plan import Decode, Plan
from loongjax.engine.binding import Flight
from loongjax.engine.jumps import foresee
from loongjax.engine.snapshot import take_snapshot
from loongjax.engine.state import EngineState
from loongjax.runtime.protocol import Runtime
from loongjax.scheduler.observation import Observation
from loongjax.scheduler.policy import Policy
from loongjax.scheduler.validate import check_plan


class Advice:
    """Asks a policy.

    What it remembers of an answer that nobody follows would be wrong, so a copy is asked about the future, and takes
    the policy's place if its answer is followed.
    """

    def __init__(self, policy: Policy, runtime: Runtime, state: EngineState, *, checks: bool) -> None:
        """`checks`: whether every answer is held to the contract of `Policy.plan`."""
        self._policy = policy
        self._runtime = runtime
        self._state = state
        self._checks = checks

    def observe(self, observations: Sequence[Observation]) -> None:
        """Tells the policy what has happened since it was told last."""
        if observations:
            self._policy.observe(observations)

    def plans(self) -> tuple[Plan, ...]:
        """What is to be done now."""
        return self._ask(self._policy)

    def repeats(self, flight: Flight, decode: Decode) -> bool:
        """Whether the same decode and nothing else would follow this flight of it; if so, it is as good as decided."""
        rehearsing = self._policy.copy()
        if self._ask(rehearsing, as_if_over=flight) != (decode,):
            return False
        self._policy = rehearsing
        return True

    def would_repeat(self, flight: Flight, decode: Decode, num_steps: int) -> bool:
        """Whether the same decode and nothing else would follow so many steps of it, the one in flight included."""
        return self._ask(self._policy.copy(), as_if_over=flight, num_more_steps=num_steps - 1) == (decode,)

    def _ask(self, policy: Policy, as_if_over: Flight | None = None, num_more_steps: int = 0) -> tuple[Plan, ...]:
        """What a policy answers now; with `as_if_over`, once that decode is over, and as many steps more."""
        state = self._state
        view = take_snapshot(
            shape=state.shape,
            limits=self._runtime.limits,
            kv_cache=state.kv_cache,
            waiting=state.waiting,
            live=state.live,
            flights=state.flights,
            now_s=self._runtime.now_s(),
            as_if_over=as_if_over,
        )
        if num_more_steps and as_if_over is not None and isinstance(as_if_over.plan, Decode):
            view = foresee(view, as_if_over.plan, num_more_steps)
        plans = policy.plan(view)
        if self._checks:
            check_plan(view, plans)
        return plans
