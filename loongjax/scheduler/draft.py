"""What is left of the cluster while an answer is being put together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from loongjax.core.cluster import Group, InstanceId
from loongjax.core.plan import Decode, Migrate, Plan, Preempt, Prefill, PrefillRequest, SubBatch
from loongjax.scheduler.request_view import RunningView
from loongjax.scheduler.running import Running
from loongjax.scheduler.view import ClusterView


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
        self.residents = [local.requests for local in view.residents.local]
        """Requests with keys on an instance, oldest first."""
        self.straddling = view.residents.straddling
        """Requests with keys on more than one instance, oldest first."""
        self.newest = [local.newest for local in view.residents.local]
        """Those whose newest token lies on an instance, oldest first."""
        self.num_newest = list(map(len, self.newest))
        self.has_prefills = False
        """Whether this answer starts a prefill."""
        self._growth_pages = view.shape.num_pages_for(growth_tokens)
        self._iterations: list[Plan] = []
        self._preempted: list[str] = []

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The answer so far. Preemptions come first: the others may use their pages."""
        preemptions = (Preempt(tuple(self._preempted)),) if self._preempted else ()
        return (*preemptions, *self._iterations)

    @property
    def has_preempted(self) -> bool:
        """Whether this answer preempts anybody."""
        return bool(self._preempted)

    def residents_of(self, instances: Iterable[InstanceId]) -> list[RunningView]:
        """Requests with keys on any of these instances, each once."""
        residents = list(itertools.chain.from_iterable([self.residents[instance] for instance in instances]))
        return list({request.request_id: request for request in residents}.values()) if self.straddling else residents

    def room(self, instance: InstanceId) -> int:
        """Free pages beyond those promised to the requests that grow there."""
        return max(0, self.free[instance] - self.num_newest[instance] * self._growth_pages)

    def reserve(self, instances: Iterable[InstanceId]) -> None:
        """Leaves these instances idle in this answer, for something that will take them soon."""
        self.idle.difference_update(instances)

    def preempt(self, request: RunningView) -> None:
        assert not request.is_in_flight, request
        self._preempted.append(request.request_id)
        master, _ = request.kv[-1]
        self.newest[master] = _without(self.newest[master], request)
        self.num_newest[master] -= 1
        self.straddling = _without(self.straddling, request)
        for instance, num_tokens in request.kv:
            self.free[instance] += self.shape.num_pages_for(num_tokens)
            self.residents[instance] = _without(self.residents[instance], request)

    def prefill(self, group: Group, requests: Sequence[PrefillRequest]) -> None:
        page_size = self.shape.page_size
        for request in requests:
            # Every cut is a multiple of a page, so that each piece takes pages of its own.
            for instance, begin, end in request.kept:
                self.free[instance] -= -((begin - end) // page_size)
        self.idle.difference_update(group.instances)
        self.prefilling.update(group.instances)
        self.has_prefills = True
        self._iterations.append(Prefill(group, tuple(requests)))

    def decode(self, group: Group, sub_batches: Sequence[SubBatch]) -> None:
        self.idle.difference_update(group.instances)
        self._iterations.append(Decode(group, tuple(sub_batches)))

    def migrate(self, request_id: str, source: InstanceId, target: InstanceId, num_tokens: int) -> None:
        self.idle.difference_update((source, target))
        self._iterations.append(Migrate(request_id, source, target, num_tokens))


def _without(requests: Iterable[RunningView], request: RunningView) -> Running:
    return Running([other for other in requests if other is not request])
