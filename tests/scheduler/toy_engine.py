"""An engine without a model: it applies plans to a `KVCache`; what completes next is for the test to choose."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable

from loongjax.core.cluster import ClusterShape, Group
from loongjax.core.plan import Decode, Extend, Migrate, Plan, Preempt, Prefill
from loongjax.core.request import NO_SLO, FinishReason, ServiceLevel
from loongjax.costmodel.work import DecodeWork, PrefillWork, Strategy
from loongjax.engine.failures import MAX_FAILURES
from loongjax.kvcache.kv_cache import KVCache
from loongjax.scheduler.observation import IterationEnded, Observation, RequestEnded
from loongjax.scheduler.policy import Policy
from loongjax.scheduler.request_view import RunningView, WaitingView
from loongjax.scheduler.residents import Residents
from loongjax.scheduler.validate import check_plan
from loongjax.scheduler.view import ClusterView, FlightView, InstanceView
from loongjax.scheduler.waiting import Waiting


@dataclasses.dataclass
class Job:
    """One request, and how it gets on."""

    request_id: str
    order: int
    num_prompt_tokens: int
    max_tokens: int
    priority: int = 0
    slo: ServiceLevel = NO_SLO
    arrival_s: float = 0.0
    first_token_s: float | None = None
    num_generated: int = 0
    num_failures: int = 0
    """Failed iterations since its last token."""
    is_aborted: bool = False

    @property
    def is_over(self) -> bool:
        return self.is_aborted or self.num_generated >= self.max_tokens

    def waiting_view(self) -> WaitingView:
        return WaitingView(
            request_id=self.request_id,
            order=self.order,
            num_tokens=self.num_prompt_tokens + self.num_generated,
            max_total_tokens=self.num_prompt_tokens + self.max_tokens,
            keeps_kv=self.max_tokens > 0,
            is_suspect=self.num_failures > 0,
            needs_whole_prefill=self.max_tokens == 0,
            num_output_tokens=self.num_generated,
            arrival_s=self.arrival_s,
            priority=self.priority,
            slo=self.slo,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class InFlight:
    plan: Prefill | Decode | Extend | Migrate
    group: Group
    request_ids: tuple[str, ...]
    work: PrefillWork | DecodeWork | None
    started_s: float

    def view(self) -> FlightView:
        return FlightView(plan=self.plan, group=self.group, work=self.work, started_s=self.started_s)


class ToyEngine:
    """Its clock stands still but when an iteration completes: then it is at least `duration_s` after its start."""

    def __init__(
        self,
        policy: Policy,
        shape: ClusterShape,
        *,
        max_num_batched_tokens: int = 10**9,
        max_num_seqs: int = 256,
        duration_s: Callable[[FlightView], float] = lambda flight: 1.0,
    ) -> None:
        self.policy = policy
        self.shape = shape
        self.cache = KVCache(shape)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = max_num_seqs
        self.jobs: dict[str, Job] = {}
        self.waiting: deque[WaitingView] = deque()
        self.running: dict[str, Job] = {}
        self.in_flight: list[InFlight] = []
        self.history: list[Plan] = []
        self.num_arrived = 0
        self.now_s = 0.0
        self.duration_s = duration_s
        self.news: list[Observation] = []

    def add(self, num_prompt_tokens: int, max_tokens: int, *, priority: int = 0, slo: ServiceLevel = NO_SLO) -> Job:
        order = self.num_arrived
        job = Job(f"r{order}", order, num_prompt_tokens, max_tokens, priority, slo, self.now_s)
        self.num_arrived += 1
        self.jobs[job.request_id] = job
        self._enqueue(job)
        return job

    def abort(self, request_id: str) -> None:
        job = self.jobs[request_id]
        job.is_aborted = True
        if not any(request_id in iteration.request_ids for iteration in self.in_flight):
            self._end(job)

    def view(self) -> ClusterView:
        busy: dict[int, bool] = {}
        flying: set[str] = set()
        for iteration in self.in_flight:
            busy |= dict.fromkeys(iteration.group.instances, isinstance(iteration.plan, Prefill))
            flying.update(iteration.request_ids)
        return ClusterView(
            shape=self.shape,
            instances=tuple(
                InstanceView(
                    instance=instance,
                    num_free_pages=self.cache.free_pages(instance),
                    is_busy=instance in busy,
                    is_prefilling=busy.get(instance, False),
                )
                for instance in self.shape.all_instances
            ),
            waiting=Waiting(self.waiting),
            residents=Residents.of(
                [
                    RunningView(
                        request_id=job.request_id,
                        order=job.order,
                        num_tokens=self.cache.num_tokens(job.request_id),
                        max_total_tokens=job.num_prompt_tokens + job.max_tokens,
                        max_output_tokens=job.max_tokens,
                        kv=self.cache.local_lens(job.request_id),
                        is_in_flight=job.request_id in flying,
                        num_uncomputed_tokens=max(1, self._num_uncomputed(job)),
                        is_suspect=job.num_failures > 0,
                        num_output_tokens=job.num_generated,
                        arrival_s=job.arrival_s,
                        first_token_s=job.first_token_s,
                        priority=job.priority,
                        slo=job.slo,
                    )
                    for job in self.running.values()
                ],
                self.shape.num_instances,
            ),
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
            now_s=self.now_s,
            flights=tuple(iteration.view() for iteration in self.in_flight),
        )

    def ask(self) -> tuple[Plan, ...]:
        """Asks the policy, checks its answer, and starts what it says."""
        view = self.view()
        if self.news:
            self.policy.observe(self.news)
            self.news = []
        plans = self.policy.plan(view)
        check_plan(view, plans)
        for plan in plans:
            self._apply(plan)
        self.history.extend(plans)
        self.cache.check_integrity()
        assert self.in_flight or not self.jobs, f"nothing runs and {sorted(self.jobs)} are alive"
        return plans

    def complete(self, index: int) -> InFlight:
        """Ends an iteration in flight; every request of it gets its token, unless it was migrated or still has others
        to be computed."""
        iteration = self.in_flight.pop(index)
        self.now_s = max(self.now_s, iteration.started_s + self.duration_s(iteration.view()))
        if iteration.work is not None and not isinstance(iteration.plan, Migrate):
            self.news.append(
                IterationEnded(
                    plan=iteration.plan,
                    strategy=Strategy(iteration.group.dop, self.shape.tp),
                    work=iteration.work,
                    elapsed_s=self.now_s - iteration.started_s,
                )
            )
        for request_id in iteration.request_ids:
            job = self.jobs[request_id]
            is_in_part = isinstance(iteration.plan, Extend) and self._num_uncomputed(job) > 0
            if not isinstance(iteration.plan, Migrate) and not is_in_part:
                job.num_generated += 1
                job.num_failures = 0
                job.first_token_s = self.now_s if job.first_token_s is None else job.first_token_s
            if job.is_over:
                self._end(job)
        return iteration

    def complete_next(self) -> InFlight:
        """Ends the iteration that is over first, by `duration_s`."""
        ends_s = [iteration.started_s + self.duration_s(iteration.view()) for iteration in self.in_flight]
        return self.complete(ends_s.index(min(ends_s)))

    def fail(self, index: int) -> InFlight:
        """Ends an iteration in flight without a token: its instances lose all keys, and requests that have failed twice
        end. Only where no iteration is in flight that shares keys with it."""
        iteration = self.in_flight.pop(index)
        lost = [name for name in self.running if set(self.cache.holders(name)) & set(iteration.group.instances)]
        for request_id in {*lost, *iteration.request_ids}:
            job = self.running.pop(request_id)
            self.cache.release(request_id)
            job.num_failures += request_id in iteration.request_ids
            self._enqueue(job)
            if job.is_over or job.num_failures == MAX_FAILURES:
                self._end(job)
        return iteration

    def run(self) -> None:
        """Asks and completes, first come first served, until every request has ended."""
        self.ask()
        while self.in_flight:
            self.complete(0)
            self.ask()

    def _apply(self, plan: Plan) -> None:
        match plan:
            case Preempt():
                for request_id in plan.request_ids:
                    self.cache.release(request_id)
                    self._enqueue(self.running.pop(request_id))
            case Prefill():
                for request in plan.requests:
                    self.waiting = deque(view for view in self.waiting if view.request_id != request.request_id)
                    self.running[request.request_id] = self.jobs[request.request_id]
                    self.cache.keep(request.request_id, request.kept)
                names = tuple(request.request_id for request in plan.requests)
                jobs = [self.jobs[name] for name in names]
                work = PrefillWork(new_lens=tuple(job.num_prompt_tokens + job.num_generated for job in jobs))
                self.in_flight.append(InFlight(plan, plan.group, names, work, self.now_s))
            case Decode():
                for batch in plan.sub_batches:
                    for request_id in batch.request_ids:
                        self.cache.append(request_id, batch.master)
                num_keys = dict.fromkeys(plan.group.instances, 0)
                for request_id in plan.request_ids:
                    for instance, num_held in self.cache.local_lens(request_id):
                        num_keys[instance] += num_held
                work = DecodeWork(
                    rows=tuple(len(batch.request_ids) for batch in plan.sub_batches), keys=tuple(num_keys.values())
                )
                self.in_flight.append(InFlight(plan, plan.group, plan.request_ids, work, self.now_s))
            case Extend():
                self._extend(plan)
            case Migrate():
                self.cache.migrate(plan.request_id, plan.source, plan.target, plan.num_tokens)
                group = Group.of((plan.source, plan.target))
                self.in_flight.append(InFlight(plan, group, (plan.request_id,), None, self.now_s))

    def _extend(self, plan: Extend) -> None:
        (instance,) = plan.group.instances
        past_lens = []
        for chunk in plan.chunks:
            past_lens.append(self.cache.num_tokens(chunk.request_id) if chunk.request_id in self.cache else 0)
            self.waiting = deque(view for view in self.waiting if view.request_id != chunk.request_id)
            self.running[chunk.request_id] = self.jobs[chunk.request_id]
            self.cache.extend(chunk.request_id, instance, chunk.num_tokens)
        new_lens = tuple(chunk.num_tokens for chunk in plan.chunks)
        work = PrefillWork(new_lens=new_lens, past_lens=tuple(past_lens))
        self.in_flight.append(InFlight(plan, plan.group, plan.request_ids, work, self.now_s))

    def _num_uncomputed(self, job: Job) -> int:
        return job.num_prompt_tokens + job.num_generated - self.cache.num_tokens(job.request_id)

    def _enqueue(self, job: Job) -> None:
        """Into the queue's order: by priority, then by age."""
        views = [*self.waiting, job.waiting_view()]
        self.waiting = deque(sorted(views, key=lambda view: (view.priority, view.order)))

    def _end(self, job: Job) -> None:
        del self.jobs[job.request_id]
        self.news.append(
            RequestEnded(
                num_prompt_tokens=job.num_prompt_tokens,
                num_output_tokens=min(job.num_generated, job.max_tokens),
                finish_reason=FinishReason.ABORT if job.is_aborted else FinishReason.LENGTH,
            )
        )
        if self.running.pop(job.request_id, None) is not None:
            self.cache.release(job.request_id)
        else:
            self.waiting = deque(view for view in self.waiting if view.request_id != job.request_id)
