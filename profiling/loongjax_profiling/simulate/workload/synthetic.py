"""A workload from a distribution of lengths and a process of arrivals."""

from __future__ import annotations

import numpy as np

from loongjax_profiling.simulate.workload.arrivals import arrival_times
from loongjax_profiling.simulate.workload.lengths import LengthDistribution
from loongjax_profiling.simulate.workload.request import WorkloadRequest


def synthesize(
    distribution: LengthDistribution, *, rate: float, num_requests: int, cv: float = 1.0, seed: int = 0
) -> list[WorkloadRequest]:
    """So many requests, in order of arrival. The same seed gives the same requests at every rate and variation.

    Raises:
        ConfigError: as `arrival_times`.
    """
    for_lengths, for_arrivals = np.random.SeedSequence(seed).spawn(2)
    times = arrival_times(rate, num_requests, np.random.default_rng(for_arrivals), cv=cv)
    lengths = distribution.sample(num_requests, np.random.default_rng(for_lengths))
    return [
        WorkloadRequest(arrival_s=arrival_s, prompt_len=prompt_len, output_len=output_len)
        for arrival_s, prompt_len, output_len in zip(
            times.tolist(), lengths.prompt.tolist(), lengths.output.tolist(), strict=True
        )
    ]
