"""One engine with its policy and its instances, on a virtual clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from loongjax.core.request import Request, ServiceLevel
from loongjax.core.sampling import SamplingParams
from loongjax.costmodel.model import CostModel
from loongjax.engine.client import EngineStats, ModelInfo
from loongjax.engine.core import EngineCore
from loongjax.runtime.simulated import NO_HOST, TOKEN_ID, HostTimes, SimulatedRuntime, Span
from loongjax.scheduler.policy import Policy
from loongjax_profiling.records import RequestRecord
from loongjax_profiling.simulate.cluster import VOCAB_SIZE, ClusterSpec
from loongjax_profiling.simulate.workload.request import WorkloadRequest

UNLIMITED = 1 << 40
"""No request is refused for the length of the queue."""
_SAMPLING = SamplingParams(temperature=0.0, ignore_eos=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A request of the workload on its way into a pod."""

    request_id: str
    request: WorkloadRequest
    slo: ServiceLevel


@dataclasses.dataclass
class _Progress:
    job: Job
    num_tokens: int = 0
    first_token_s: float | None = None


class Pod:
    """Drives an `EngineCore` over a `SimulatedRuntime`, and keeps records of its requests."""

    def __init__(
        self,
        cluster: ClusterSpec,
        policy: Policy,
        cost_model: CostModel,
        *,
        max_whole_prompt_len: int | None = None,
        step_by_step: bool = False,
        run_ahead: bool = False,
        host: HostTimes = NO_HOST,
        start_s: float = 0.0,
        on_span: Callable[[Span], None] = lambda span: None,
        on_record: Callable[[RequestRecord], None] = lambda record: None,
        checks: bool = False,
    ) -> None:
        """A pod at rest.

        Args:
            cluster: its instances.
            policy: decides.
            cost_model: says how long iterations take.
            max_whole_prompt_len: see `ModelInfo`.
            step_by_step: whether the policy is asked after every decode step, instead of letting decodes jump.
            run_ahead: whether iterations are submitted before those before them have ended, as by a real engine, and
                step by step therefore; else whoever comes waits for the step in flight alone.
            host: what the host adds to the times of iterations.
            start_s: what its clock shows.
            on_span: is told of each iteration when it is over.
            on_record: is told of each request when it has ended.
            checks: see `EngineCore`.
        """
        self.cluster = cluster
        self.limits = cluster.limits
        self._host = host
        self._runtime = SimulatedRuntime(
            cluster.shape, self.limits, cost_model, host=host, start_s=start_s, on_span=on_span
        )
        self._core = EngineCore(
            self._runtime,
            policy,
            info=ModelInfo(
                checkpoint="simulated",
                max_model_len=self.limits.max_model_len,
                max_whole_prompt_len=max_whole_prompt_len,
                vocab_size=VOCAB_SIZE,
                eos_token_ids=(),
                default_sampling={},
            ),
            max_queue_len=UNLIMITED,
            run_ahead=run_ahead,
            jump=not (step_by_step or run_ahead),
            checks=checks,
        )
        self._on_record = on_record
        self._progress: dict[str, _Progress] = {}

    @property
    def now_s(self) -> float:
        """When something last happened here."""
        return self._runtime.now_s()

    @property
    def num_live(self) -> int:
        """Requests that wait or run."""
        return len(self._progress)

    def can_hold(self, request: WorkloadRequest) -> bool:
        """Whether a request of this length can ever run here."""
        return request.prompt_len + request.output_len <= self.limits.max_model_len

    def add(self, job: Job, time_s: float) -> None:
        """Accepts a request, which the pod `can_hold`, at a time until which it was run."""
        self._runtime.advance_to(time_s)
        request = job.request
        self._progress[job.request_id] = _Progress(job)
        self._core.add(
            Request(
                request_id=job.request_id,
                prompt_token_ids=(TOKEN_ID,) * request.prompt_len,
                sampling=_SAMPLING,
                max_tokens=request.output_len,
                seed=0,
                arrival_s=request.arrival_s,
                slo=job.slo,
            )
        )

    def run_until(self, time_s: float) -> list[RequestRecord]:
        """Does all that happens until then, that moment included; who has ended by it.

        The clock stays at the last thing that happened.
        """
        records: list[RequestRecord] = []
        while not self._core.is_idle and not (self._core.is_settled and self._runtime.next_event_s > time_s):
            events = self._core.step(None)
            told_s = self.now_s + self._host.telling_s
            for event in events:
                progress = self._progress[event.request_id]
                if event.token_ids and progress.first_token_s is None:
                    progress.first_token_s = told_s
                progress.num_tokens += len(event.token_ids)
                if event.finish_reason is not None:
                    del self._progress[event.request_id]
                    records.append(_record(progress, told_s, event.error))
                    self._on_record(records[-1])
        return records

    def records_if_ended(self, time_s: float) -> list[RequestRecord]:
        """Of those who have not ended by a time until which it was run: as if each got all that it lacks just then."""
        return [_ended_at_once(progress, time_s) for progress in self._progress.values()]

    def stats(self) -> EngineStats:
        """See `EngineCore.stats`."""
        return self._core.stats()


def waiting_record(job: Job, time_s: float) -> RequestRecord:
    """As `Pod.records_if_ended`, of a request that no pod has."""
    return _ended_at_once(_Progress(job), time_s)


def _ended_at_once(progress: _Progress, time_s: float) -> RequestRecord:
    first_token_s = time_s if progress.first_token_s is None else progress.first_token_s
    served = _Progress(progress.job, progress.job.request.output_len, first_token_s)
    return _record(served, time_s, error=None)


def _record(progress: _Progress, complete_s: float, error: str | None) -> RequestRecord:
    job = progress.job
    return RequestRecord(
        request_id=job.request_id,
        prompt_len=job.request.prompt_len,
        output_len=progress.num_tokens,
        issue_s=job.request.arrival_s,
        first_token_s=progress.first_token_s,
        complete_s=complete_s,
        ttft_slo_s=job.slo.ttft_s,
        tpot_slo_s=job.slo.tpot_s,
        error=error,
    )
