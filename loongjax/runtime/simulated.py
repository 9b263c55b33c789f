"""A runtime without devices: a virtual clock, and iterations that take as long as a cost model says.

Iterations that share an instance run in order of submission, as everywhere. Tokens mean nothing here: every one has
id 0, so a request's length has to be known in advance (`max_tokens`, and no stop tokens).

The clock moves from the end of one iteration to the next (`completions`), and to when a request comes (`advance_to`).
Durations are added in order, so a decode of many steps (`prolong`) ends at exactly the time at which as many decodes of
one step would.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Sequence

import numpy as np

from loongjax.core.cluster import ClusterShape, Group, InstanceId
from loongjax.core.iteration import (
    Completion,
    DecodeIteration,
    ExtendIteration,
    Iteration,
    MigrateIteration,
    PrefillIteration,
    SampledToken,
)
from loongjax.costmodel.iteration_work import new_keys, work_of
from loongjax.costmodel.model import CostModel
from loongjax.costmodel.work import DecodeTotals, DecodeWork, PrefillWork, Strategy
from loongjax.runtime.protocol import RuntimeLimits

TOKEN_ID = 0
"""Every token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostTimes:
    """What the host of a real engine adds to the times of iterations, in seconds; `loongjax replay` measures it."""

    intake_s: float = 0.0
    """From a request's arrival until the step loop has it: it takes requests between two steps."""
    turnaround_s: float = 0.0
    """From there, or from a result, to the submission of what follows from it. A decode that goes on is taken to be
    submitted ahead, as it is unless it needs pages of those who leave it, and does not wait for that. Nor does whatever
    an engine that runs ahead submits while something else is in flight."""
    decode_begin_s: float = 0.0
    """How much longer the first step of a decode takes than those that go on with it: the host makes it ready, while
    the devices wait unless something is in flight before it."""
    prefill_begin_s: float = 0.0
    """The same of a prefill or an extend."""
    telling_s: float = 0.0
    """From a result until clients have its tokens: the step loop submits what follows first."""


NO_HOST = HostTimes()
"""Iterations follow each other without a gap."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """One thing that a group did, from its beginning to its end on the virtual clock."""

    kind: str
    """"prefill", "decode", "extend", "migrate" or "recover"."""
    group: Group
    begin_s: float
    end_s: float
    num_requests: int
    num_steps: int


@dataclasses.dataclass(eq=False)
class _Run:
    """An iteration between its submission and its last completion."""

    iteration: Iteration
    work: PrefillWork | DecodeWork | None
    submitted_s: float
    begin_s: float
    ends_s: np.ndarray
    """When each of its steps ends: float64 [steps], ascending."""
    num_reported: int = 0
    """Steps that the engine has been told of."""
    tokens: tuple[SampledToken, ...] = ()

    @property
    def end_s(self) -> float:
        return float(self.ends_s[-1])


class SimulatedRuntime:
    """Implements `loongjax.runtime.protocol.JumpingRuntime`."""

    def __init__(
        self,
        shape: ClusterShape,
        limits: RuntimeLimits,
        cost_model: CostModel,
        *,
        host: HostTimes = NO_HOST,
        start_s: float = 0.0,
        on_span: Callable[[Span], None] = lambda span: None,
    ) -> None:
        """A cluster at rest.

        Args:
            shape: the cluster.
            limits: of iterations.
            cost_model: says how long each takes.
            host: what comes on top of that.
            start_s: what the clock shows, in seconds.
            on_span: is told of each iteration when it is over.
        """
        self._shape = shape
        self._limits = limits
        self._cost_model = cost_model
        self._host = host
        self._on_span = on_span
        self._clock_s = start_s
        self._busy_until_s: dict[InstanceId, float] = dict.fromkeys(shape.all_instances, start_s)
        self._runs: dict[int, _Run] = {}
        """By iteration id, in order of submission."""
        self._ends: list[tuple[float, int]] = []
        """A heap of (end, iteration id); entries of runs that end at another time by now are stale."""
        self._jumps: set[int] = set()
        """Ids of decodes with more than one step."""

    @property
    def shape(self) -> ClusterShape:
        return self._shape

    @property
    def limits(self) -> RuntimeLimits:
        return self._limits

    @property
    def num_recompiles(self) -> int:
        return 0

    @property
    def next_event_s(self) -> float:
        """When the next iteration ends; inf if none is in flight."""
        while self._ends:
            end_s, iteration_id = self._ends[0]
            run = self._runs.get(iteration_id)
            if run is not None and run.end_s == end_s:
                return end_s
            heapq.heappop(self._ends)
        return math.inf

    def now_s(self) -> float:
        return self._clock_s

    def advance_to(self, time_s: float) -> None:
        """Moves the clock to a time before which nothing happens."""
        assert self._clock_s <= time_s <= self.next_event_s, (self._clock_s, time_s, self.next_event_s)
        self._clock_s = time_s

    def wake(self) -> None:
        """Nothing: nobody waits in real time."""

    def close(self, *, waits: bool = True) -> None:
        """Forgets what is in flight."""
        self._runs.clear()
        self._ends.clear()

    def submit(self, iteration: Iteration) -> None:
        instances = iteration.group.instances
        is_decode = isinstance(iteration, DecodeIteration)
        turnaround_s = 0.0 if is_decode and iteration.continues else self._host.turnaround_s
        submitted_s = self._clock_s + turnaround_s
        begin_s = max([submitted_s, *[self._busy_until_s[instance] for instance in instances]])
        work = work_of(iteration)
        ready_s = max(begin_s, submitted_s + self._begin_s(iteration))
        end_s = ready_s + self._duration_s(iteration, work)
        run = _Run(iteration, work, self._clock_s, begin_s, np.asarray([end_s]), tokens=_tokens(iteration))
        self._runs[iteration.iteration_id] = run
        self._schedule(run)

    def prolong(self, iteration_id: int, num_steps: int) -> None:
        """See `JumpingRuntime.prolong`."""
        run = self._runs[iteration_id]
        work = run.work
        assert isinstance(run.iteration, DecodeIteration), run.iteration
        assert isinstance(work, DecodeWork), work
        assert len(run.ends_s) == run.num_reported + 1, "it jumps already"
        totals = _totals_of_steps(run.iteration, work, num_steps, first=run.num_reported)
        strategy = Strategy(run.iteration.group.dop, self._shape.tp)
        durations_s = self._cost_model.decode_s(strategy, totals)
        later_s = np.add.accumulate(np.concatenate([run.ends_s[-1:], durations_s[1:]]))[1:]
        run.ends_s = np.concatenate([run.ends_s, later_s])
        self._jumps.add(iteration_id)
        self._schedule(run)

    def catch_up(self, *, stop: bool) -> list[Completion]:
        """See `JumpingRuntime.catch_up`."""
        completions = []
        for iteration_id in sorted(self._jumps):
            run = self._runs[iteration_id]
            num_over = int(np.searchsorted(run.ends_s, self._clock_s, side="right"))
            ends_now = num_over > 0 and float(run.ends_s[num_over - 1]) == self._clock_s
            if ends_now or stop:
                run.ends_s = run.ends_s[: num_over if ends_now else num_over + 1]
                self._jumps.remove(iteration_id)
                self._schedule(run)
            if ends_now:
                completions.append(self._land(run))
            elif num_over > run.num_reported:
                completions.append(self._report(run, num_over, is_over=False))
        return completions

    def completions(self, timeout_s: float | None) -> list[Completion]:
        if timeout_s != 0.0:
            limit_s = math.inf if timeout_s is None else self._clock_s + timeout_s
            until_s = min(limit_s, self.next_event_s)
            if until_s < math.inf:
                self._clock_s = until_s
        completions = []
        while self.next_event_s <= self._clock_s:
            _, iteration_id = heapq.heappop(self._ends)
            completions.append(self._land(self._runs[iteration_id]))
        return completions

    def _land(self, run: _Run) -> Completion:
        iteration = run.iteration
        del self._runs[iteration.iteration_id]
        self._jumps.discard(iteration.iteration_id)
        num_steps = len(run.ends_s)
        self._on_span(
            Span(
                kind=_kind(iteration),
                group=iteration.group,
                begin_s=run.begin_s,
                end_s=run.end_s,
                num_requests=_num_requests(iteration),
                num_steps=num_steps,
            )
        )
        return self._report(run, num_steps, is_over=True)

    def _report(self, run: _Run, num_over: int, *, is_over: bool) -> Completion:
        first, run.num_reported = run.num_reported, num_over
        steps_s: list[float] = []
        if len(run.ends_s) > 1:
            steps_s = np.diff(
                run.ends_s[first:num_over], prepend=run.ends_s[first - 1] if first else run.begin_s
            ).tolist()
        return Completion(
            run.iteration.iteration_id,
            run.tokens,
            float(run.ends_s[num_over - 1]) - run.submitted_s,
            steps_s=tuple(steps_s),
            is_over=is_over,
        )

    def _schedule(self, run: _Run) -> None:
        for instance in run.iteration.group.instances:
            self._busy_until_s[instance] = run.end_s
        heapq.heappush(self._ends, (run.end_s, run.iteration.iteration_id))

    def _begin_s(self, iteration: Iteration) -> float:
        match iteration:
            case DecodeIteration():
                return 0.0 if iteration.continues else self._host.decode_begin_s
            case PrefillIteration() | ExtendIteration():
                return self._host.prefill_begin_s
        return 0.0

    def _duration_s(self, iteration: Iteration, work: PrefillWork | DecodeWork | None) -> float:
        strategy = Strategy(iteration.group.dop, self._shape.tp)
        match work:
            case PrefillWork():
                return self._cost_model.prefill_s(strategy, work.totals).item()
            case DecodeWork():
                return self._cost_model.decode_s(strategy, DecodeTotals.of([work])).item()
        if isinstance(iteration, MigrateIteration):
            return self._cost_model.migration_s(len(iteration.source_slots), self._shape.tp)
        return 0.0


def _totals_of_steps(iteration: DecodeIteration, work: DecodeWork, num_steps: int, first: int) -> DecodeTotals:
    """Totals of a decode's steps first, first + 1, ...: arrays [num_steps].

    Each step, a master holds one key more of each of its requests.
    """
    growth = np.asarray(new_keys(iteration), np.float64)
    steps = np.arange(first, first + num_steps, dtype=np.float64)
    keys = np.asarray(work.keys, np.float64) + steps[:, None] * growth
    first_step = DecodeTotals.of([work])
    return DecodeTotals(
        num_rows=first_step.num_rows,
        num_masters=first_step.num_masters,
        busiest_rows=first_step.busiest_rows,
        busiest_keys=keys.max(axis=1),
    )


def _tokens(iteration: Iteration) -> tuple[SampledToken, ...]:
    """What one step gives."""
    match iteration:
        case PrefillIteration():
            requests: Sequence[str] = [item.request.request_id for item in iteration.inputs]
        case DecodeIteration():
            requests = [item.request.request_id for batch in iteration.sub_batches for item in batch.inputs]
        case ExtendIteration():
            requests = [item.request.request_id for item in iteration.inputs if item.is_sampled]
        case _:
            requests = []
    return tuple([SampledToken(request_id, TOKEN_ID) for request_id in requests])


def _num_requests(iteration: Iteration) -> int:
    match iteration:
        case PrefillIteration() | ExtendIteration():
            return len(iteration.inputs)
        case DecodeIteration():
            return sum(len(batch.inputs) for batch in iteration.sub_batches)
    return 0


def _kind(iteration: Iteration) -> str:
    return type(iteration).__name__.removesuffix("Iteration").lower()
