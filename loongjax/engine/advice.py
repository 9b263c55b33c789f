"""What the policy says: of the cluster as it is, and of the cluster as it will be once an iteration is over."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import cast

from loongjax.core.plan import Decode, Extend, Migrate, Plan, Preempt, Prefill
from loongjax.costmodel.corrector import Kind
from loongjax.costmodel.work import PrefillWork, Strategy
from loongjax.engine.binding import Flight
from loongjax.engine.jumps import foresee
from loongjax.engine.snapshot import take_snapshot
from loongjax.engine.state import EngineState
from loongjax.kvcache.kv_cache import KVCache
from loongjax.runtime.protocol import Runtime
from loongjax.scheduler.observation import Observation
from loongjax.scheduler.policy import ExplainedPolicy, Policy, PredictingPolicy
from loongjax.scheduler.validate import check_plan
from loongjax.scheduler.view import ClusterView

LONGEST_AHEAD = 4096
"""Tokens up to which a prefill is submitted behind a decode, and a decode behind it. Beside a longer one it does not
matter how long the host takes to make the next iteration ready, while who comes meanwhile does, and what becomes free.
"""


@dataclasses.dataclass(frozen=True, eq=False)
class _Rehearsal:
    """An answer about the future."""

    view: ClusterView
    policy: Policy
    """The copy that gave it."""
    plans: tuple[Plan, ...]

    def is_about(self, view: ClusterView) -> bool:
        """Whether all has come as foreseen, whenever that was."""
        return view == dataclasses.replace(self.view, now_s=view.now_s)


class Advice:
    """Asks a policy.

    What it remembers of an answer that nobody follows would be wrong, so a copy is asked about the future, and takes
    the policy's place if its answer is followed. That is when it can be carried out behind what is in flight, or when
    the future has come as foreseen: then what is to be done was decided while the devices were busy, and nobody waits
    for it.
    """

    def __init__(self, policy: Policy, runtime: Runtime, state: EngineState, *, checks: bool) -> None:
        """`checks`: whether every answer is held to the contract of `Policy.plan`."""
        self._policy = policy
        self._is_explained = isinstance(policy, ExplainedPolicy)
        self._runtime = runtime
        self._state = state
        self._checks = checks
        self._rehearsals: dict[int, _Rehearsal] = {}
        """What would follow an iteration in flight, by its id, as the policy remembers things now."""

    def observe(self, observations: Sequence[Observation]) -> None:
        """Tells the policy what has happened since it was told last."""
        if observations:
            self._policy.observe(observations)
            for rehearsal in self._rehearsals.values():
                rehearsal.policy.observe(observations)

    def predicted_over_actual(self) -> Mapping[tuple[Kind, Strategy], float]:
        """See `PredictingPolicy`; nothing of a policy that predicts nothing."""
        return self._policy.predicted_over_actual() if isinstance(self._policy, PredictingPolicy) else {}

    def plans(self) -> tuple[Plan, ...]:
        """What is to be done now."""
        view = self._snapshot()
        for rehearsal in self._rehearsals.values():
            if rehearsal.is_about(view):
                self._follow(rehearsal.policy)
                return rehearsal.plans
        self._follow(self._policy)
        return self._ask(self._policy, view)

    def follows(self, flight: Flight) -> Decode | Prefill | Extend | None:
        """What is to be submitted behind a flight: what would follow it, if that is one thing on its group, and needs
        nothing that the host will know only then.

        Where something else would follow a decode, that is remembered; what follows others depends on when. Where
        nobody is left, nobody is asked.
        """
        if not self._may_be_followed(flight):
            return None
        view = self._snapshot(as_if_over=flight)
        if not (len(view.residents) or view.waiting):
            return None
        iteration_id = flight.iteration.iteration_id
        known = self._rehearsals.get(iteration_id)
        if known is None or not known.is_about(view):
            rehearsing = self._policy.copy()
            known = _Rehearsal(view, rehearsing, self._ask(rehearsing, view))
            if isinstance(flight.plan, Decode):
                self._rehearsals[iteration_id] = known
        # Pages that it waited for may be free by now, though all will come as foreseen: who would end has been aborted.
        if len(known.plans) != 1 or not self._can_be_behind(flight, known.plans[0]):
            return None
        self._follow(known.policy)
        return cast(Decode | Prefill | Extend, known.plans[0])

    def _may_be_followed(self, flight: Flight) -> bool:
        """Whether anything can be submitted behind it, whatever the policy says."""
        match flight.plan, flight.work:
            case Decode(), _:
                return True
            case Prefill(), PrefillWork() as work:
                is_short = sum(work.new_lens) <= LONGEST_AHEAD
                return is_short and self._is_all_that_is_due(0) and not _have_penalties(flight)
            case Extend(), _:
                return not _have_penalties(flight)
            case _:
                return False

    def _can_be_behind(self, flight: Flight, plan: Plan) -> bool:
        """Whether it keeps the order of `Flights`, needs no pages of those who end by the flight, and of those who get
        a token by it nothing but that token, which the devices have.
        """
        if isinstance(plan, Preempt | Migrate) or plan.group != flight.group:
            return False
        kv_cache = self._state.kv_cache
        match flight.plan, plan:
            case Decode(), Decode():
                goes_on = self._state.flights.continues(plan)
                return goes_on and (plan == flight.plan or _has_slots(plan, kv_cache))
            case Prefill() | Extend(), Decode():
                return _has_slots(plan, kv_cache)
            case Decode() | Extend(), Extend():
                (instance,) = plan.group.instances
                chunks = {chunk.request_id: chunk.num_tokens for chunk in plan.chunks}
                return not _have_penalties(flight) and kv_cache.can_extend(chunks, instance)
            case Decode(), Prefill():
                num_tokens = sum([self._state.live[request.request_id].num_tokens for request in plan.requests])
                is_due = num_tokens <= LONGEST_AHEAD and self._is_all_that_is_due(len(plan.requests))
                return is_due and kv_cache.can_keep(*[request.kept for request in plan.requests])
            case _:
                return False

    def _is_all_that_is_due(self, num_prefilled: int) -> bool:
        """Whether nobody waits beside those who are prefilled. Who does may get more instances if it is decided only
        when these are idle, for others may be by then.
        """
        return len(self._state.waiting) == num_prefilled or self._state.shape.num_instances == 1

    def would_repeat(self, flight: Flight, decode: Decode, num_steps: int) -> bool:
        """Whether the same decode and nothing else would follow so many steps of it, the one in flight included."""
        view = self._snapshot(as_if_over=flight)
        if num_steps > 1:
            view = foresee(view, decode, num_steps - 1)
        return self._ask(self._policy.copy(), view) == (decode,)

    def _follow(self, policy: Policy) -> None:
        """From now on this one knows what was done; what others would do after something else is of no use."""
        if self._is_explained and policy is not self._policy:
            cast(ExplainedPolicy, policy).note_followed()
        self._policy = policy
        self._rehearsals = {}

    def _snapshot(self, as_if_over: Flight | None = None) -> ClusterView:
        """The cluster as it is; with `as_if_over`, once that flight is over."""
        state = self._state
        return take_snapshot(
            shape=state.shape,
            limits=self._runtime.limits,
            kv_cache=state.kv_cache,
            waiting=state.waiting,
            roster=state.roster,
            flights=state.flights,
            now_s=self._runtime.now_s(),
            as_if_over=as_if_over,
        )

    def _ask(self, policy: Policy, view: ClusterView) -> tuple[Plan, ...]:
        plans = policy.plan(view)
        if self._checks:
            check_plan(view, plans)
        return plans


def _have_penalties(flight: Flight) -> bool:
    """Whether somebody's token by it has to be counted, which the host does."""
    return any(live.request.sampling.has_penalties for live in flight.requests)


def _has_slots(decode: Decode, kv_cache: KVCache) -> bool:
    return all(kv_cache.can_append(batch.request_ids, batch.master) for batch in decode.sub_batches)
