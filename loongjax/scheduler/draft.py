"""What is left of the cluster while an answer is being put together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loongjax.core.cluster import Group, InstanceId
from loongjax.core.plan import Decode, Migrate, Plan, Preempt, Prefill, PrefillRequest, SubBatch
from loongjax.scheduler.view import ClusterView, RunningView


class Draft:
    """A working copy of a `ClusterView`, from which plans take instances and pages.

    Args:
        view: the cluster.
        growth_tokens: tokens of room that a running request is promised where its newest token lies.
    """

    def __init__(self, view: ClusterView, growth_tokens: int) -> None:
        self.view = view
        self.shape = view.shape
        self.free = [instance.num_free_pages for instance in view.instances]
        """Free pages, by instance."""
        self.idle = {instance.instance for instance in view.instances if not instance.is_busy}
        """Instances that no iteration, no plan of this answer and no reservation occupies."""
        self.prefilling = {instance.instance for instance in view.instances if instance.is_prefilling}
        """Instances that will be busy for long, those of this answer's prefills included."""
        self.decoding = {instance.instance for instance in view.instances if instance.is_busy} - self.prefilling
        """Instances that will be idle soon."""
        self.residents: list[list[RunningView]] = [[] for _ in view.instances]
        """Requests with keys on an instance."""
        self.straddling: list[RunningView] = []
        """Requests with keys on more than one instance."""
        self._growth_pages = view.shape.num_pages_for(growth_tokens)
        self._iterations: list[Plan] = []
        self._preempted: list[str] = []
        residents = self.residents
        for request in view.running:
            kv = request.kv
            if len(kv) == 1:
                residents[kv[0][0]].append(request)
            elif kv:
                self.straddling.append(request)
                for instance, _ in kv:
                    residents[instance].append(request)
        self.num_newest = [len(requests) for requests in residents]
        """Requests whose newest token lies on an instance."""
        for request in self.straddling:
            for instance, _ in request.kv[:-1]:
                self.num_newest[instance] -= 1

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The answer so far. Preemptions come first: the others may use their pages."""
        preemptions = (Preempt(tuple(self._preempted)),) if self._preempted else ()
        return (*preemptions, *self._iterations)

    @property
    def has_prefills(self) -> bool:
        """Whether this answer starts a prefill."""
        return any(isinstance(plan, Prefill) for plan in self._iterations)

    @property
    def has_preempted(self) -> bool:
        """Whether this answer preempts anybody."""
        return bool(self._preempted)

    def residents_of(self, instances: Iterable[InstanceId]) -> list[RunningView]:
        """Requests with keys on any of these instances, each once."""
        found = {request.request_id: request for instance in instances for request in self.residents[instance]}
        return list(found.values())

    def room(self, instance: InstanceId) -> int:
        """Free pages beyond those promised to the requests that grow there."""
        return max(0, self.free[instance] - self.num_newest[instance] * self._growth_pages)

    def reserve(self, instances: Iterable[InstanceId]) -> None:
        """Leaves these instances idle in this answer, for something that will take them soon."""
        self.idle.difference_update(instances)

    def preempt(self, request: RunningView) -> None:
        assert not request.is_in_flight, request
        self._preempted.append(request.request_id)
        self.num_newest[request.kv[-1][0]] -= 1
        self.straddling = [other for other in self.straddling if other is not request]
        for instance, num_tokens in request.kv:
            self.free[instance] += self.shape.num_pages_for(num_tokens)
            self.residents[instance] = [other for other in self.residents[instance] if other is not request]

    def prefill(self, group: Group, requests: Sequence[PrefillRequest]) -> None:
        for request in requests:
            num_tokens: dict[InstanceId, int] = {}
            for interval in request.kept:
                instance = interval.instance
                num_tokens[instance] = num_tokens.get(instance, 0) + interval.end - interval.begin
            for instance, count in num_tokens.items():
                self.free[instance] -= self.shape.num_pages_for(count)
        self.idle.difference_update(group.instances)
        self.prefilling.update(group.instances)
        self._iterations.append(Prefill(group, tuple(requests)))

    def decode(self, group: Group, sub_batches: Sequence[SubBatch]) -> None:
        self.idle.difference_update(group.instances)
        self._iterations.append(Decode(group, tuple(sub_batches)))

    def migrate(self, request_id: str, source: InstanceId, target: InstanceId, num_tokens: int) -> None:
        self.idle.difference_update((source, target))
        self._iterations.append(Migrate(request_id, source, target, num_tokens))
