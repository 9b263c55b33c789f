"""A runtime that notes when its iterations began and ended."""

from __future__ import annotations

import dataclasses

from loongjax.core.cluster import ClusterShape, Group, InstanceId
from loongjax.core.iteration import Completion, DecodeIteration, Iteration, MigrateIteration
from loongjax.costmodel.iteration_work import work_of
from loongjax.costmodel.model import CostModel
from loongjax.costmodel.work import DecodeTotals, DecodeWork, PrefillWork, Strategy
from loongjax.runtime.protocol import Runtime, RuntimeLimits


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TracedIteration:
    """An iteration that is over. Times are on the runtime's clock, in seconds."""

    kind: str
    """"prefill", "decode", "extend", "migrate" or "recover"."""
    group: Group
    continues: bool
    """Of a decode: whether it went on with what the devices held of the last step."""
    work: PrefillWork | DecodeWork | int | None
    """What it had to do; of a migration its tokens; None: nothing that a cost model knows of."""
    submitted_s: float
    begin_s: float
    """When it was submitted, or when the last iteration on its instances ended if that came later; its own end at most,
    since results are read side by side."""
    end_s: float
    """When its result was on the host."""
    turnaround_s: float | None
    """From the end of the last iteration of which the engine had just learned to this one's submission; None: it
    waited behind another, or followed an arrival."""
    error: str | None

    @property
    def is_behind(self) -> bool:
        """Whether something before it was still in flight on its instances when it was submitted."""
        return self.begin_s > self.submitted_s

    @property
    def elapsed_s(self) -> float:
        """What the iteration itself took."""
        return self.end_s - self.begin_s

    def predicted_s(self, cost_model: CostModel, tp: int) -> float | None:
        """What a model says it takes; None if it says nothing of such iterations."""
        strategy = Strategy(self.group.dop, tp)
        match self.work:
            case PrefillWork():
                return cost_model.prefill_s(strategy, self.work.totals).item()
            case DecodeWork():
                return cost_model.decode_s(strategy, DecodeTotals.of([self.work])).item()
            case int():
                return cost_model.migration_s(self.work, tp)
        return None


@dataclasses.dataclass
class _InFlight:
    iteration: Iteration
    work: PrefillWork | DecodeWork | int | None
    submitted_s: float
    news_s: float | None
    """When the last iteration ended of which the engine had just learned."""


class TracedRuntime:
    """Implements `loongjax.runtime.protocol.Runtime` by another one, and keeps what its iterations were."""

    def __init__(self, inner: Runtime) -> None:
        """Closes `inner` when it is closed."""
        self._inner = inner
        self._in_flight: dict[int, _InFlight] = {}
        self._last_end_s: dict[InstanceId, float] = {}
        self._news_s: float | None = None
        self._iterations: list[TracedIteration] = []

    @property
    def shape(self) -> ClusterShape:
        return self._inner.shape

    @property
    def limits(self) -> RuntimeLimits:
        return self._inner.limits

    @property
    def num_recompiles(self) -> int:
        return self._inner.num_recompiles

    def submit(self, iteration: Iteration) -> None:
        submitted_s = self._inner.now_s()
        self._inner.submit(iteration)
        # After the submission: nobody waits for it.
        work = len(iteration.source_slots) if isinstance(iteration, MigrateIteration) else work_of(iteration)
        self._in_flight[iteration.iteration_id] = _InFlight(iteration, work, submitted_s, self._news_s)

    def completions(self, timeout_s: float | None) -> list[Completion]:
        completions = self._inner.completions(timeout_s)
        ends_s = [self._note(completion) for completion in completions]
        self._news_s = max(ends_s, default=None)
        return completions

    def wake(self) -> None:
        self._inner.wake()

    def now_s(self) -> float:
        return self._inner.now_s()

    def close(self, *, waits: bool = True) -> None:
        self._inner.close(waits=waits)

    @property
    def news_s(self) -> float | None:
        """When the last of the iterations ended that the engine was told of when it last asked; None: of none."""
        return self._news_s

    def take_iterations(self) -> list[TracedIteration]:
        """Those that have ended since the last call, in the order in which the engine was told of them."""
        taken, self._iterations = self._iterations, []
        return taken

    def _note(self, completion: Completion) -> float:
        flight = self._in_flight.pop(completion.iteration_id)
        iteration = flight.iteration
        end_s = flight.submitted_s + completion.elapsed_s
        instances = iteration.group.instances
        free_s = max([self._last_end_s.get(instance, flight.submitted_s) for instance in instances])
        self._last_end_s.update(dict.fromkeys(instances, end_s))
        is_behind = free_s > flight.submitted_s
        self._iterations.append(
            TracedIteration(
                kind=type(iteration).__name__.removesuffix("Iteration").lower(),
                group=iteration.group,
                continues=isinstance(iteration, DecodeIteration) and iteration.continues,
                work=flight.work,
                submitted_s=flight.submitted_s,
                begin_s=min(max(flight.submitted_s, free_s), end_s),
                end_s=end_s,
                turnaround_s=None if is_behind or flight.news_s is None else flight.submitted_s - flight.news_s,
                error=completion.error,
            )
        )
        return end_s
