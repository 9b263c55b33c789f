"""A workload on a system, from the first arrival to the last token."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import tqdm

from loongjax.config import SchedulingConfig
from loongjax.core.cluster import Group, InstanceId
from loongjax.core.request import NO_SLO, ServiceLevel
from loongjax.costmodel.model import CostModel, FittedModel
from loongjax.costmodel.work import Strategy
from loongjax.engine.client import EngineStats
from loongjax.errors import ConfigError
from loongjax.runtime.simulated import NO_HOST, HostTimes, Span
from loongjax.scheduler.build import build_policy, largest_group, max_request_tokens, max_whole_prompt_len
from loongjax_profiling.records import RequestRecord
from loongjax_profiling.simulate.cluster import ClusterSpec
from loongjax_profiling.simulate.load import LoadPredictor
from loongjax_profiling.simulate.pod import Job, Pod, waiting_record
from loongjax_profiling.simulate.router import Router
from loongjax_profiling.simulate.workload.request import WorkloadRequest

NUM_LOOKS = 50
POD_SIZE = 16
"""Instances that one policy looks after."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulatedSystem:
    """What serves.

    Raises:
        ConfigError: a pod without instances.
    """

    cluster: ClusterSpec
    scheduling: SchedulingConfig
    """Names the policy, and says what it is told."""
    cost_model: CostModel
    """How long iterations take, and what the policy believes of that."""
    pod_size: int = POD_SIZE
    """Instances of a pod; a smaller cluster is a single one."""
    step_by_step: bool = False
    """Ask the policy after every decode step, instead of letting decodes jump."""
    run_ahead: bool = False
    """Step by step, and iterations are submitted before those before them have ended, as by a real engine."""
    host: HostTimes = NO_HOST
    """What the host adds to the times of iterations."""
    checks: bool = False
    """Check every plan, and the integrity of all state after every step. For tests."""

    def __post_init__(self) -> None:
        if self.pod_size < 1:
            raise ConfigError(f"a pod has at least one instance, got {self.pod_size}")

    def parts(self) -> list[tuple[InstanceId, ...]]:
        """The instances of each pod: as few pods as can be, as even as can be."""
        count = self.cluster.num_instances
        num_pods = -(-count // self.pod_size)
        edges = [count * index // num_pods for index in range(num_pods + 1)]
        return [tuple(range(begin, end)) for begin, end in itertools.pairwise(edges)]

    def require_times(self, workload: Sequence[WorkloadRequest]) -> None:
        """Whether the cost model knows all that it may be asked for while these requests are served.

        Raises:
            ConfigError: it does not.
        """
        model = self.cost_model
        if not isinstance(model, FittedModel):
            return
        num_instances, tp = self._most_instances(workload), self.cluster.tp
        try:
            model.require(Strategy(sp, tp) for sp in range(1, largest_group(self.scheduling, num_instances) + 1))
            if self.scheduling.policy == "disaggregated":
                model.migration_s(1, tp)
        except ConfigError as error:
            raise ConfigError(
                f"the policy {self.scheduling.policy} on {num_instances} instances of tp={tp} cannot be simulated: "
                f"{error}, or give --num-instances, --pod-size or --tp that it knows"
            ) from None

    def _most_instances(self, workload: Sequence[WorkloadRequest]) -> int:
        """Of a pod, or of the pods that merge for a request of this workload."""

        def most_tokens(num_instances: int) -> int:
            return self._pod_cluster(num_instances).limits.max_model_len

        count, largest = self.cluster.num_instances, max(map(len, self.parts()))
        lens = [request.prompt_len + request.output_len for request in workload]
        longest = max((length for length in lens if length <= most_tokens(count)), default=0)
        needed = next(number for number in range(largest, count + 1) if most_tokens(number) >= longest)
        # All but the last pod of a merger are too few.
        return largest if needed == largest else min(count, needed - 1 + largest)

    def build_pod(
        self,
        instances: tuple[InstanceId, ...],
        on_span: Callable[[Span], None] = lambda span: None,
        on_record: Callable[[RequestRecord], None] = lambda record: None,
    ) -> Pod:
        """A pod at rest, of these instances of the cluster, which spans name."""

        def rename(span: Span) -> None:
            names = Group.of(instances[index] for index in span.group.instances)
            on_span(dataclasses.replace(span, group=names))

        cluster = self._pod_cluster(len(instances))
        policy = build_policy(
            self.scheduling, shape=cluster.shape, max_num_seqs=cluster.max_num_seqs, cost_model=self.cost_model
        )
        return Pod(
            cluster,
            policy,
            self.cost_model,
            max_whole_prompt_len=max_whole_prompt_len(self.scheduling, cluster.max_num_batched_tokens),
            step_by_step=self.step_by_step,
            run_ahead=self.run_ahead,
            host=self.host,
            on_span=rename,
            on_record=on_record,
            checks=self.checks,
        )

    def _pod_cluster(self, num_instances: int) -> ClusterSpec:
        """So many instances, and no longer requests than the policy can carry to their ends on them."""
        cluster = self.cluster.of_size(num_instances)
        most = max_request_tokens(self.scheduling, cluster.shape, cluster.max_num_batched_tokens)
        return dataclasses.replace(cluster, max_model_len=min(cluster.limits.max_model_len, most))


def simulate(
    system: SimulatedSystem,
    workload: Sequence[WorkloadRequest],
    *,
    slo: Callable[[WorkloadRequest], ServiceLevel] = lambda request: NO_SLO,
    on_span: Callable[[Span], None] = lambda span: None,
    on_record: Callable[[RequestRecord], None] = lambda record: None,
    on_end: Callable[[Sequence[EngineStats]], None] = lambda stats: None,
    is_hopeless: Callable[[Sequence[RequestRecord]], bool] | None = None,
    progress: bool = False,
) -> list[RequestRecord]:
    """Records of all requests, in order of arrival.

    Args:
        system: what serves.
        workload: in order of arrival.
        slo: what each request wishes for.
        on_span: is told of each iteration when it is over.
        on_record: is told of each request when it has ended; what it was told stays true if the simulation is stopped.
        on_end: is told what the engine of each pod has counted, also if the simulation is stopped.
        is_hopeless: asked now and then whether to stop, given the records as they would be if all that is missing came
            at once, at no cost to who has not arrived. Those are the result if it stops. Without it nobody is asked.
        progress: whether to show a bar.

    Raises:
        ConfigError: a cost model that lacks what the policy may ask for, before anything is simulated.
    """
    system.require_times(workload)
    records: list[RequestRecord] = []
    with tqdm.tqdm(total=len(workload), unit="request", disable=not progress) as bar, contextlib.ExitStack() as at_end:

        def keep(record: RequestRecord) -> None:
            records.append(record)
            bar.update()
            on_record(record)

        router = Router(
            system.parts(),
            lambda instances: system.build_pod(instances, on_span, keep),
            LoadPredictor(system.cost_model, system.cluster.tp),
        )
        at_end.callback(lambda: on_end(router.stats()))
        jobs = [
            Job(request_id=f"request-{index}", request=request, slo=slo(request))
            for index, request in enumerate(workload)
        ]
        num_arrived = 0

        def stops_at(time_s: float) -> list[RequestRecord] | None:
            """Runs until then. What the records come to if it is hopeless."""
            router.run_until(time_s)
            to_come = [waiting_record(job, job.request.arrival_s) for job in jobs[num_arrived:]]
            best = in_order_of_arrival([*records, *router.records_if_ended(time_s), *to_come])
            return best if is_hopeless is not None and is_hopeless(best) else None

        looks = _times_to_look(workload) if is_hopeless is not None else iter((math.inf,))
        look_s = next(looks)
        run_s = -math.inf
        for job in jobs:
            taken_s = job.request.arrival_s + system.host.intake_s
            while look_s < taken_s:
                if (best := stops_at(look_s)) is not None:
                    return best
                look_s = next(looks)
            if taken_s > run_s:  # who comes at the same moment is there when the policy is asked
                run_s = taken_s
                router.run_until(run_s)
            num_arrived += 1
            refused = router.add(job, run_s)
            if refused is not None:
                keep(refused)
        while look_s < math.inf and len(records) < len(jobs):
            if (best := stops_at(look_s)) is not None:
                return best
            look_s = next(looks)
        router.run_until(math.inf)
    assert len(records) == len(workload), (len(records), len(workload))
    return in_order_of_arrival(records)


def _times_to_look(workload: Sequence[WorkloadRequest]) -> Iterator[float]:
    """While requests come `NUM_LOOKS` times, behind that as often; at most once a second, or requests that all come at
    once would be looked at without end.
    """
    times = [request.arrival_s for request in workload] or [0.0]
    interval_s = max(1.0, (times[-1] - times[0]) / NUM_LOOKS)
    return (times[0] + number * interval_s for number in itertools.count(1))


def in_order_of_arrival(records: Iterable[RequestRecord]) -> list[RequestRecord]:
    """Records of one simulation, sorted as its workload is."""
    return sorted(records, key=lambda record: int(record.request_id.removeprefix("request-")))
