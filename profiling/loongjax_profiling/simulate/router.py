"""Large clusters as pods: each has an engine and a policy of its own, and a router hands the requests out.

A policy looks at all instances whenever it is asked, which is too much beyond some tens. So a request goes to the pod
with the least predicted work per instance. One that no pod can hold gets several at once: the router gives them nothing
more to do, and when they are empty their instances serve such requests as one pod, and are parted again.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence

from loongjax.core.cluster import InstanceId
from loongjax.engine.client import EngineStats
from loongjax_profiling.records import RequestRecord
from loongjax_profiling.simulate.load import LoadPredictor
from loongjax_profiling.simulate.pod import Job, Pod, waiting_record

PodFactory = Callable[[tuple[InstanceId, ...]], Pod]
"""Makes a pod at rest, of these instances of the cluster."""


@dataclasses.dataclass
class _Site:
    """A pod, and what the router has given it to do."""

    instances: tuple[InstanceId, ...]
    pod: Pod
    work_s: float = 0.0
    """Predicted instance-seconds of the requests that have not ended."""
    is_open: bool = True
    """Whether it takes requests; not while it is being emptied to merge with others."""

    @property
    def load_s(self) -> float:
        return self.work_s / len(self.instances)


@dataclasses.dataclass
class _Merger:
    """Pods that serve as one for a request that none of them can hold."""

    members: list[_Site]
    begun_s: float
    """When they were chosen."""
    pod: Pod | None = None
    """All of their instances; None while the members still have requests."""


class Router:
    """Hands requests to pods, and runs all of them on one virtual time."""

    def __init__(
        self, parts: Sequence[tuple[InstanceId, ...]], build_pod: PodFactory, predictor: LoadPredictor
    ) -> None:
        """A cluster at rest.

        Args:
            parts: the instances of each pod.
            build_pod: makes pods, these and merged ones.
            predictor: says how much work a request is.
        """
        self._build_pod = build_pod
        self._predictor = predictor
        self._sites = [_Site(instances, build_pod(instances)) for instances in parts]
        self._placed: dict[str, tuple[_Site, float]] = {}
        """Requests in pods that are not merged: where, and how much work."""
        self._oversized: collections.deque[Job] = collections.deque()
        """Those that wait for a merger, in order of arrival."""
        self._stranded: collections.deque[Job] = collections.deque()
        """Those that came when every pod was closed."""
        self._merger: _Merger | None = None
        self._past_stats: list[EngineStats] = []
        """Of mergers that are over."""
        self._whole = self._most_pods_needed()

    def add(self, job: Job, time_s: float) -> RequestRecord | None:
        """Takes a request at a time until which the cluster was run; a record at once if it can never be served."""
        if any(site.pod.can_hold(job.request) for site in self._sites):
            self._place(job, time_s)
            return None
        if not self._whole.can_hold(job.request):
            return _refused(job, time_s)
        self._oversized.append(job)
        if self._merger is None:
            self._merger = self._begin_merger(time_s)
        return None

    def run_until(self, time_s: float) -> list[RequestRecord]:
        """Does all that happens until then; who has ended by it."""
        records = self._run_sites(time_s)
        while self._merger is not None:
            more, is_over = self._run_merger(self._merger, time_s)
            records += more
            if not is_over:
                break
            records += self._run_sites(time_s)
        return records

    def records_if_ended(self, time_s: float) -> list[RequestRecord]:
        """See `Pod.records_if_ended`."""
        records = [record for pod in self._pods() for record in pod.records_if_ended(time_s)]
        return records + [waiting_record(job, time_s) for job in (*self._oversized, *self._stranded)]

    def stats(self) -> list[EngineStats]:
        """Of each pod, those of mergers that are over included."""
        return [*self._past_stats, *[pod.stats() for pod in self._pods()]]

    def _pods(self) -> list[Pod]:
        """Those that serve now."""
        pods = [site.pod for site in self._sites]
        if self._merger is not None and self._merger.pod is not None:
            pods.append(self._merger.pod)
        return pods

    def _run_sites(self, time_s: float) -> list[RequestRecord]:
        records = [record for site in self._sites for record in site.pod.run_until(time_s)]
        for record in records:
            site, work_s = self._placed.pop(record.request_id)
            site.work_s -= work_s
            self._predictor.observe(record.output_len)
        return records

    def _place(self, job: Job, time_s: float) -> None:
        able = [site for site in self._sites if site.is_open and site.pod.can_hold(job.request)]
        if not able:
            self._stranded.append(job)
            return
        site = min(able, key=lambda site: site.load_s)
        work_s = self._predictor.seconds(job.request.prompt_len)
        site.work_s += work_s
        self._placed[job.request_id] = site, work_s
        site.pod.add(job, time_s)

    def _begin_merger(self, time_s: float) -> _Merger:
        """Closes as many pods as the first oversized request needs, those with least to do."""
        request = self._oversized[0].request
        by_load = sorted(self._sites, key=lambda site: site.load_s)
        num_members = 2
        while not self._build_pod(_joined(by_load[:num_members])).can_hold(request):
            num_members += 1
        members = by_load[:num_members]
        for site in members:
            site.is_open = False
        return _Merger(members, time_s)

    def _run_merger(self, merger: _Merger, time_s: float) -> tuple[list[RequestRecord], bool]:
        """(who has ended, whether the merger is over)."""
        if merger.pod is None:
            if any(site.pod.num_live for site in merger.members):
                return [], False
            begin_s = max(merger.begun_s, *[site.pod.now_s for site in merger.members])
            merger.pod = self._build_pod(_joined(merger.members))
            while self._oversized and merger.pod.can_hold(self._oversized[0].request):
                merger.pod.add(self._oversized.popleft(), begin_s)
        records = merger.pod.run_until(time_s)
        if merger.pod.num_live:
            return records, False
        self._past_stats.append(merger.pod.stats())
        self._part(merger, merger.pod.now_s)
        return records, True

    def _part(self, merger: _Merger, time_s: float) -> None:
        """The members serve on their own again, first those who had to wait outside."""
        for site in merger.members:
            site.is_open = True
        stranded, self._stranded = self._stranded, collections.deque()
        for job in stranded:
            self._place(job, time_s)
        self._merger = self._begin_merger(time_s) if self._oversized else None

    def _most_pods_needed(self) -> Pod:
        """The whole cluster as one: what it cannot hold is refused."""
        return self._build_pod(_joined(self._sites))


def _joined(sites: Sequence[_Site]) -> tuple[InstanceId, ...]:
    return tuple(sorted(instance for site in sites for instance in site.instances))


def _refused(job: Job, time_s: float) -> RequestRecord:
    request = job.request
    return RequestRecord(
        request_id=job.request_id,
        prompt_len=request.prompt_len,
        output_len=0,
        issue_s=request.arrival_s,
        first_token_s=None,
        complete_s=time_s,
        ttft_slo_s=job.slo.ttft_s,
        tpot_slo_s=job.slo.tpot_s,
        error=f"the whole cluster cannot hold {request.prompt_len} + {request.output_len} tokens",
    )
