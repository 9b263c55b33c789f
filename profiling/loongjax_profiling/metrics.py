"""What a benchmark comes to: the paper's normalised latencies, percentiles, and how many requests met their wishes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from loongjax_profiling.records import RequestRecord


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distribution:
    """Of one number over the requests."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Distribution | None:
        """None of no values. Percentiles interpolate linearly between the two nearest."""
        array = np.fromiter(values, np.float64)
        if not len(array):
            return None
        p50, p90, p99 = np.percentile(array, (50, 90, 99)).tolist()
        return cls(mean=float(array.mean()), p50=p50, p90=p90, p99=p99, max=float(array.max()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingMetrics:
    """Over all requests of a benchmark; latencies over those that succeeded.

    Normalised latencies are means of each request's own ratio, as in the paper's evaluation.
    """

    num_requests: int
    num_failed: int
    duration_s: float
    """From the first request sent to the last one ended."""
    request_throughput: float
    """Requests that succeeded, a second."""
    input_throughput: float
    """Their prompt tokens, a second."""
    output_throughput: float
    """Their generated tokens, a second."""
    per_token_latency_s: Distribution | None
    """Latency over prompt and output tokens."""
    input_token_latency_s: Distribution | None
    """Time to first token over prompt tokens."""
    output_token_latency_s: Distribution | None
    """Time per output token, 0 of a single one."""
    ttft_s: Distribution | None
    latency_s: Distribution | None
    slo_attainment: float
    """Part of the requests that met their wishes, 0 to 1; those that failed did not."""
    goodput: float
    """Requests that met their wishes, a second."""

    @classmethod
    def of(cls, records: Sequence[RequestRecord]) -> ServingMetrics:
        succeeded = [record for record in records if record.error is None and record.first_token_s is not None]
        begin_s = min((record.issue_s for record in records), default=0.0)
        duration_s = max((record.complete_s for record in records), default=0.0) - begin_s
        num_good = sum(record.meets_slo for record in records)

        def rate(count: int) -> float:
            return count / duration_s if duration_s > 0.0 else 0.0

        return cls(
            num_requests=len(records),
            num_failed=len(records) - len(succeeded),
            duration_s=duration_s,
            request_throughput=rate(len(succeeded)),
            input_throughput=rate(sum(record.prompt_len for record in succeeded)),
            output_throughput=rate(sum(record.output_len for record in succeeded)),
            per_token_latency_s=Distribution.of(r.latency_s / (r.prompt_len + r.output_len) for r in succeeded),
            input_token_latency_s=Distribution.of(r.ttft_s / r.prompt_len for r in succeeded if r.ttft_s is not None),
            output_token_latency_s=Distribution.of(r.tpot_s for r in succeeded if r.tpot_s is not None),
            ttft_s=Distribution.of(r.ttft_s for r in succeeded if r.ttft_s is not None),
            latency_s=Distribution.of(r.latency_s for r in succeeded),
            slo_attainment=num_good / len(records) if records else 1.0,
            goodput=rate(num_good),
        )

    def as_json(self) -> dict[str, Any]:
        """Numbers and objects that `json` can write."""
        return dataclasses.asdict(self)
