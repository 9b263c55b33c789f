"""Simulated against measured: the latencies of requests, and the iterations in which an error arises."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from loongjax.costmodel.model import CostModel
from loongjax.runtime.simulated import HostTimes, Span
from loongjax_profiling.elasticity import Elasticity
from loongjax_profiling.metrics import Distribution, ServingMetrics
from loongjax_profiling.records import RequestRecord
from loongjax_profiling.replay.traced_runtime import TracedIteration

LATENCIES: dict[str, str] = {
    "ttft_s": "time to first token",
    "output_token_latency_s": "per output token",
    "latency_s": "whole request",
    "per_token_latency_s": "per token",
    "input_token_latency_s": "per input token",
}
"""Those that are compared: fields of `ServingMetrics`, in words."""
STATISTICS = ("mean", "p50", "p90")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatencyComparison:
    """One number over the same requests, on both sides."""

    latency: str
    """A key of `LATENCIES`."""
    statistic: str
    """One of `STATISTICS`."""
    measured_s: float
    simulated_s: float

    @property
    def relative_error(self) -> float | None:
        """(simulated - measured) / measured; 0 if both are 0, None if only the measured one is."""
        difference_s = self.simulated_s - self.measured_s
        if difference_s == 0.0:
            return 0.0
        return difference_s / self.measured_s if self.measured_s else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class IterationComparison:
    """The iterations of one kind and degree of parallelism."""

    kind: str
    """As of `TracedIteration`, with decodes that begin apart from those that continue."""
    dop: int
    num_measured: int
    measured_s: float
    """Mean time of those that the engine ran."""
    predicted_s: float | None
    """Mean of what the cost model says of the very same; None: nothing."""
    absolute_error: float | None
    """Sum of |predicted - measured| over them, over the sum of their times; None: nothing is predicted."""
    turnaround_s: float | None
    """Mean time between the end of an iteration and the submission of one of these, where there was such a wait; None:
    nowhere."""

    @property
    def relative_error(self) -> float | None:
        """(predicted - measured) / measured, of the means: where many results come at once, single times say little."""
        return None if self.predicted_s is None else self.predicted_s / self.measured_s - 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulatedIterations:
    """What a simulation ran of one kind and degree of parallelism."""

    kind: str
    dop: int
    num_simulated: int
    """Steps of decodes, and other iterations."""
    simulated_s: float
    """Their mean time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayComparison:
    """Everything compared."""

    host: HostTimes
    """What the simulations took the host to add."""
    latencies: tuple[LatencyComparison, ...]
    """Simulated with the cost model scaled to what iterations took in the calibration."""
    latencies_as_fitted: tuple[LatencyComparison, ...]
    """The same, simulated with the cost model as it is in its file."""
    latencies_in_hindsight: tuple[LatencyComparison, ...]
    """The same, simulated with the means of this very replay, of iterations and of the host: what is still wrong with
    them is not the cost model's fault."""
    iterations: tuple[IterationComparison, ...]
    simulated_iterations: tuple[SimulatedIterations, ...]
    elasticity: Elasticity
    """What the engine's decode groups did."""
    simulated_elasticity: Elasticity

    def as_json(self) -> dict[str, Any]:
        """Numbers and objects that `json` can write."""
        errors = {
            name: [dataclasses.asdict(row) | {"relative_error": row.relative_error} for row in getattr(self, name)]
            for name in ("latencies", "latencies_as_fitted", "latencies_in_hindsight")
        }
        return dataclasses.asdict(self) | errors


def compare_latencies(
    measured: Sequence[RequestRecord], simulated: Sequence[RequestRecord]
) -> tuple[LatencyComparison, ...]:
    """All latencies and statistics, over the requests that succeeded on both sides."""
    succeeded = _succeeded(measured) & _succeeded(simulated)
    sides = [
        ServingMetrics.of([record for record in records if record.request_id in succeeded])
        for records in (measured, simulated)
    ]
    compared = []
    for latency in LATENCIES:
        distributions: list[Distribution | None] = [getattr(metrics, latency) for metrics in sides]
        for statistic in STATISTICS:
            measured_s, simulated_s = (getattr(each, statistic, None) for each in distributions)
            if measured_s is not None and simulated_s is not None:
                compared.append(
                    LatencyComparison(
                        latency=latency, statistic=statistic, measured_s=measured_s, simulated_s=simulated_s
                    )
                )
    return tuple(compared)


def _succeeded(records: Iterable[RequestRecord]) -> set[str]:
    return {record.request_id for record in records if record.error is None and record.first_token_s is not None}


def compare_iterations(
    iterations: Sequence[TracedIteration], cost_model: CostModel, tp: int
) -> tuple[IterationComparison, ...]:
    """Those that succeeded, by kind and degree of parallelism."""
    compared = []
    for (kind, dop), some in _grouped(iterations, lambda each: (_kind(each), each.group.dop)):
        measured_s = np.asarray([each.elapsed_s for each in some])
        predictions = [each.predicted_s(cost_model, tp) for each in some]
        known = [prediction for prediction in predictions if prediction is not None]
        predicted_s = np.asarray(known) if len(known) == len(some) else None
        turnarounds_s = [each.turnaround_s for each in some if each.turnaround_s is not None]
        compared.append(
            IterationComparison(
                kind=kind,
                dop=dop,
                num_measured=len(some),
                measured_s=float(measured_s.mean()),
                predicted_s=None if predicted_s is None else float(predicted_s.mean()),
                absolute_error=(
                    float(np.abs(predicted_s - measured_s).sum() / measured_s.sum())
                    if predicted_s is not None and measured_s.any()
                    else None
                ),
                turnaround_s=float(np.mean(turnarounds_s)) if turnarounds_s else None,
            )
        )
    return tuple(compared)


def summarize_spans(spans: Sequence[Span]) -> tuple[SimulatedIterations, ...]:
    """By kind and degree of parallelism."""
    summarized = []
    for (kind, dop), some in _grouped(spans, lambda span: (span.kind, span.group.dop)):
        num_steps = sum(span.num_steps for span in some)
        total_s = sum(span.end_s - span.begin_s for span in some)
        summarized.append(
            SimulatedIterations(kind=kind, dop=dop, num_simulated=num_steps, simulated_s=total_s / num_steps)
        )
    return tuple(summarized)


def _kind(iteration: TracedIteration) -> str:
    if iteration.kind != "decode":
        return iteration.kind
    if iteration.continues:
        return "decode, continued"
    return "decode, begun behind" if iteration.is_behind else "decode, begun"


def _grouped[Item](
    items: Iterable[Item], key_of: Callable[[Item], tuple[str, int]]
) -> list[tuple[tuple[str, int], list[Item]]]:
    by_key: dict[tuple[str, int], list[Item]] = collections.defaultdict(list)
    for item in items:
        by_key[key_of(item)].append(item)
    return sorted(by_key.items())
