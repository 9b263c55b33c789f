"""An engine without a model: it applies plans to a `KVCache`; what completes next is for the test to choose."""

from __future__ import annotations

import dataclasses
from collections import deque

from loongjax.core.cluster import ClusterShape, Group
from loongjax.core.plan import Decode, Migrate, Plan, Preempt, Prefill
from loongjax.kvcache.kv_cache import KVCache
from loongjax.scheduler.policy import Policy
from loongjax.scheduler.validate import check_plan
from loongjax.scheduler.view import ClusterView, InstanceView, RunningView, WaitingView


@dataclasses.dataclass
class Job:
    """One request, and how it gets on."""

    request_id: str
    order: int
    num_prompt_tokens: int
    max_tokens: int
    num_generated: int = 0
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
        )


@dataclasses.dataclass(frozen=True, eq=False)
class InFlight:
    plan: Prefill | Decode | Migrate
    group: Group
    request_ids: tuple[str, ...]


class ToyEngine:
    def __init__(
        self, policy: Policy, shape: ClusterShape, *, max_num_batched_tokens: int = 10**9, max_num_seqs: int = 256
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

    def add(self, num_prompt_tokens: int, max_tokens: int) -> Job:
        job = Job(f"r{self.num_arrived}", self.num_arrived, num_prompt_tokens, max_tokens)
        self.num_arrived += 1
        self.jobs[job.request_id] = job
        self.waiting.append(job.waiting_view())
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
            waiting=tuple(self.waiting),
            running=tuple(
                RunningView(
                    request_id=job.request_id,
                    order=job.order,
                    num_tokens=self.cache.num_tokens(job.request_id),
                    max_total_tokens=job.num_prompt_tokens + job.max_tokens,
                    kv=self.cache.local_lens(job.request_id),
                    is_in_flight=job.request_id in flying,
                )
                for job in self.running.values()
            ),
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
        )

    def ask(self) -> tuple[Plan, ...]:
        """Asks the policy, checks its answer, and starts what it says."""
        view = self.view()
        plans = self.policy.plan(view)
        check_plan(view, plans)
        for plan in plans:
            self._apply(plan)
        self.history.extend(plans)
        self.cache.check_integrity()
        assert self.in_flight or not self.jobs, f"nothing runs and {sorted(self.jobs)} are alive"
        return plans

    def complete(self, index: int) -> InFlight:
        """Ends an iteration in flight; every request of it but a migrated one gets its token."""
        iteration = self.in_flight.pop(index)
        for request_id in iteration.request_ids:
            job = self.jobs[request_id]
            if not isinstance(iteration.plan, Migrate):
                job.num_generated += 1
            if job.is_over:
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
                    self.waiting.appendleft(self.running.pop(request_id).waiting_view())
            case Prefill():
                for request in plan.requests:
                    self.waiting = deque(view for view in self.waiting if view.request_id != request.request_id)
                    self.running[request.request_id] = self.jobs[request.request_id]
                    self.cache.keep(request.request_id, request.kept)
                names = tuple(request.request_id for request in plan.requests)
                self.in_flight.append(InFlight(plan, plan.group, names))
            case Decode():
                for batch in plan.sub_batches:
                    for request_id in batch.request_ids:
                        self.cache.append(request_id, batch.master)
                self.in_flight.append(InFlight(plan, plan.group, plan.request_ids))
            case Migrate():
                self.cache.migrate(plan.request_id, plan.source, plan.target, plan.num_tokens)
                group = Group.of((plan.source, plan.target))
                self.in_flight.append(InFlight(plan, group, (plan.request_id,)))

    def _end(self, job: Job) -> None:
        del self.jobs[job.request_id]
        if self.running.pop(job.request_id, None) is not None:
            self.cache.release(job.request_id)
        else:
            self.waiting = deque(view for view in self.waiting if view.request_id != job.request_id)
