"""The contract between a policy and the engine, as a check: can these plans be executed on this cluster?"""

from __future__ import annotations

from collections.abc import Sequence

from loongjax.core.cluster import Group, InstanceId
from loongjax.core.plan import Decode, Extend, Migrate, Plan, Preempt, Prefill, PrefillRequest
from loongjax.scheduler.request_view import RunningView, WaitingView
from loongjax.scheduler.view import ClusterView


def check_plan(view: ClusterView, plans: Sequence[Plan]) -> None:
    """Asserts that the plans can be applied to the cluster in this order, counting every page.

    Raises:
        AssertionError: which plan cannot be executed, and why.
    """
    checker = _Checker(view)
    for plan in plans:
        match plan:
            case Prefill():
                checker.check_prefill(plan)
            case Decode():
                checker.check_decode(plan)
            case Extend():
                checker.check_extend(plan)
            case Migrate():
                checker.check_migrate(plan)
            case Preempt():
                checker.check_preempt(plan)


class _Checker:
    """What is left of the cluster after the plans seen so far."""

    def __init__(self, view: ClusterView) -> None:
        self._view = view
        self._shape = view.shape
        self._idle = {instance.instance for instance in view.instances if not instance.is_busy}
        self._free = {instance.instance: instance.num_free_pages for instance in view.instances}
        self._waiting = {request.request_id: request for request in view.waiting}
        self._running = {request.request_id: request for request in view.running}
        assert len(self._waiting) == len(view.waiting), "a request waits twice"
        assert len(self._running) == len(view.running), "a request runs twice"
        assert self._waiting.keys().isdisjoint(self._running), "a request both waits and runs"

    def check_prefill(self, plan: Prefill) -> None:
        self._occupy(plan, plan.group)
        assert plan.requests, f"nothing to prefill: {plan}"
        assert len(plan.requests) <= self._view.max_num_seqs, (
            f"{len(plan.requests)} requests in a prefill of at most {self._view.max_num_seqs}"
        )
        num_tokens = 0
        for request in plan.requests:
            waiting = self._take_waiting(request.request_id)
            num_tokens += waiting.num_tokens
            assert not waiting.is_suspect or len(plan.requests) == 1, f"{request.request_id} has to be alone: {plan}"
            self._check_kept(plan.group, request, waiting)
        capacity = plan.group.dop * self._view.max_num_batched_tokens
        assert num_tokens <= capacity, f"{num_tokens} tokens in a prefill of at most {capacity}: {plan.group}"

    def check_decode(self, plan: Decode) -> None:
        self._occupy(plan, plan.group)
        assert plan.sub_batches, f"nothing to decode: {plan}"
        assert len(set(plan.masters)) == len(plan.masters), f"a master has two sub-batches: {plan.masters}"
        for batch in plan.sub_batches:
            assert batch.master in plan.group, f"master {batch.master} is not in {plan.group}"
            assert 0 < len(batch.request_ids) <= self._view.max_num_seqs, (
                f"{len(batch.request_ids)} requests in a sub-batch of 1 to {self._view.max_num_seqs}"
            )
            for request_id in batch.request_ids:
                running = self._take_running(request_id)
                assert running.kv, f"{request_id} holds no keys"
                assert running.num_uncomputed_tokens == 1, f"{request_id} is partly prefilled: {plan}"
                assert not running.is_suspect, f"{request_id} has to be computed by an extend of it alone: {plan}"
                for instance, _ in running.kv:
                    assert instance in plan.group, f"{plan.group} lacks {instance}, which holds keys of {request_id}"
                self._take_pages(batch.master, self._pages_to_grow(running, batch.master, 1), request_id)

    def check_extend(self, plan: Extend) -> None:
        assert plan.group.dop == 1, f"an extend is of one instance: {plan}"
        self._occupy(plan, plan.group)
        assert 0 < len(plan.chunks) <= self._view.max_num_seqs, (
            f"{len(plan.chunks)} requests in an extend of 1 to {self._view.max_num_seqs}"
        )
        capacity = self._view.max_num_batched_tokens
        assert plan.num_tokens <= capacity, f"{plan.num_tokens} tokens in an extend of at most {capacity}"
        (instance,) = plan.group.instances
        for chunk in plan.chunks:
            num_held, num_uncomputed, is_suspect = self._take_to_extend(chunk.request_id, instance)
            assert not is_suspect or len(plan.chunks) == 1, f"{chunk.request_id} has to be alone: {plan}"
            assert 0 < chunk.num_tokens <= num_uncomputed, f"{chunk.num_tokens} tokens of {num_uncomputed}: {chunk}"
            num_pages = self._shape.num_pages_for(num_held + chunk.num_tokens) - self._shape.num_pages_for(num_held)
            self._take_pages(instance, num_pages, chunk.request_id)

    def check_migrate(self, plan: Migrate) -> None:
        assert plan.source != plan.target, f"from an instance to itself: {plan}"
        self._occupy(plan, Group.of((plan.source, plan.target)))
        running = self._take_running(plan.request_id)
        num_held = dict(running.kv).get(plan.source, 0)
        assert 0 < plan.num_tokens <= num_held, f"{plan.num_tokens} tokens of {num_held}: {plan}"
        self._take_pages(plan.target, self._pages_to_grow(running, plan.target, plan.num_tokens), plan.request_id)
        num_pages_left = self._shape.num_pages_for(num_held - plan.num_tokens)
        self._free[plan.source] += self._shape.num_pages_for(num_held) - num_pages_left

    def check_preempt(self, plan: Preempt) -> None:
        assert plan.request_ids, "nobody to preempt"
        for request_id in plan.request_ids:
            for instance, num_tokens in self._take_running(request_id).kv:
                self._free[instance] += self._shape.num_pages_for(num_tokens)

    def _check_kept(self, group: Group, request: PrefillRequest, waiting: WaitingView) -> None:
        assert waiting.keeps_kv or not request.kept, f"{request.request_id} needs no keys afterwards"
        num_tokens: dict[InstanceId, int] = {}
        position = 0
        for interval in request.kept:
            assert interval.instance in group, f"{group} cannot keep {interval}"
            assert interval.begin == position < interval.end, f"{request} does not tile its tokens"
            assert position % self._shape.page_size == 0, f"{request} has a boundary within a page"
            num_tokens[interval.instance] = num_tokens.get(interval.instance, 0) + interval.num_tokens
            position = interval.end
        expected = waiting.num_tokens if waiting.keeps_kv else 0
        assert position == expected, f"{request} keeps {position} tokens of {expected}"
        for instance, count in num_tokens.items():
            self._take_pages(instance, self._shape.num_pages_for(count), request.request_id)

    def _occupy(self, plan: Plan, group: Group) -> None:
        for instance in group.instances:
            assert instance in self._idle, f"instance {instance} is busy or taken: {plan}"
            self._idle.remove(instance)

    def _take_to_extend(self, request_id: str, instance: InstanceId) -> tuple[int, int, bool]:
        """The keys that the request holds, the tokens that it may be extended by, and whether it is a suspect."""
        if request_id in self._waiting:
            waiting = self._take_waiting(request_id)
            assert not waiting.needs_whole_prefill, f"{request_id} has to be prefilled whole"
            return 0, waiting.num_tokens, waiting.is_suspect
        running = self._take_running(request_id)
        assert [holder for holder, _ in running.kv] == [instance], f"{request_id} holds keys elsewhere: {running.kv}"
        return running.num_tokens, running.num_uncomputed_tokens, running.is_suspect

    def _take_waiting(self, request_id: str) -> WaitingView:
        assert request_id in self._waiting, f"{request_id} does not wait, or is planned twice"
        return self._waiting.pop(request_id)

    def _take_running(self, request_id: str) -> RunningView:
        assert request_id in self._running, f"{request_id} does not run, or is planned twice"
        running = self._running.pop(request_id)
        assert not running.is_in_flight, f"{request_id} is in flight"
        return running

    def _pages_to_grow(self, running: RunningView, instance: InstanceId, num_tokens: int) -> int:
        num_held = dict(running.kv).get(instance, 0)
        return self._shape.num_pages_for(num_held + num_tokens) - self._shape.num_pages_for(num_held)

    def _take_pages(self, instance: InstanceId, num_pages: int, request_id: str) -> None:
        num_free = self._free[instance]
        assert num_pages <= num_free, f"{request_id} needs {num_pages} pages of {instance}, which has {num_free}"
        self._free[instance] = num_free - num_pages
