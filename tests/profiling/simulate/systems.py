"""Small clusters, a cost model that is easy to reckon with, and workloads for the tests of this room."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import strategies as st

from loongjax.config import SchedulingConfig
from loongjax.costmodel.model import CostModel, Source
from loongjax.costmodel.work import DecodeTotals, PrefillTotals, Strategy
from loongjax_profiling.simulate.a800 import a800_model
from loongjax_profiling.simulate.cluster import ClusterSpec
from loongjax_profiling.simulate.simulation import SimulatedSystem
from loongjax_profiling.simulate.workload.request import WorkloadRequest


@dataclasses.dataclass(frozen=True)
class RoundModel(CostModel):
    """A prefill takes a second for each 1,000 tokens of an instance, a decode step 10 ms, a migration nothing."""

    @property
    def source(self) -> Source:
        return "fitted"

    def prefill_s[Real: (float, np.ndarray)](self, strategy: Strategy, totals: PrefillTotals[Real]) -> Real:
        return totals.num_tokens / strategy.sp / 1000.0

    def decode_s[Real: (float, np.ndarray)](self, strategy: Strategy, totals: DecodeTotals[Real]) -> Real:
        return 0.01 + 0.0 * (totals.num_rows + totals.busiest_keys)

    def migration_s(self, num_tokens: int | float, tp: int) -> float:
        return 0.0


def cluster(num_instances: int = 4, num_slots: int = 4096, **options: int) -> ClusterSpec:
    return ClusterSpec(**({"tp": 2} | options), num_instances=num_instances, num_slots=num_slots)  # pyright: ignore[reportArgumentType]


def system(
    spec: ClusterSpec | None = None,
    policy: str = "simple",
    *,
    cost_model: CostModel | None = None,
    pod_size: int = 16,
    step_by_step: bool = False,
    checks: bool = True,
) -> SimulatedSystem:
    spec = spec or cluster()
    model = cost_model or a800_model(max(8, spec.num_instances))
    config = SchedulingConfig(policy=policy)  # pyright: ignore[reportArgumentType]
    return SimulatedSystem(
        cluster=spec,
        scheduling=config,
        cost_model=model,
        pod_size=pod_size,
        step_by_step=step_by_step,
        checks=checks,
    )


def arriving(*requests: tuple[float, int, int]) -> list[WorkloadRequest]:
    """(arrival, prompt length, output length) of each."""
    return [
        WorkloadRequest(arrival_s=arrival_s, prompt_len=prompt_len, output_len=output_len)
        for arrival_s, prompt_len, output_len in requests
    ]


@st.composite
def workloads(draw: st.DrawFn, max_total_len: int, max_requests: int = 12) -> list[WorkloadRequest]:
    """Requests of any length that fits, some of them at once, some far apart."""
    requests = []
    arrival_s = 0.0
    for _ in range(draw(st.integers(1, max_requests))):
        arrival_s += draw(st.sampled_from((0.0, 0.003, 0.03, 0.3, 3.0))) * draw(st.integers(1, 7))
        total_len = draw(st.integers(2, max_total_len))
        output_len = draw(st.integers(1, total_len - 1))
        requests.append((arrival_s, total_len - output_len, output_len))
    return arriving(*requests)
