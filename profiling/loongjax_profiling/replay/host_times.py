"""What the host adds to the times of iterations, from those that an engine ran."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loongjax.costmodel.model import CostModel
from loongjax.runtime.simulated import HostTimes
from loongjax_profiling.replay.traced_runtime import TracedIteration


def measure_host_times(iterations: Sequence[TracedIteration], cost_model: CostModel, tp: int) -> HostTimes:
    """Means over iterations that succeeded; 0 where there were none, or where the model says more than they took.

    The turnaround is that of iterations that did not go on with a decode, which are submitted ahead.
    """
    turnarounds_s = [each.turnaround_s for each in iterations if each.turnaround_s is not None and not each.continues]
    begins_s = []
    for each in iterations:
        predicted_s = each.predicted_s(cost_model, tp)
        if each.kind == "decode" and not each.continues and predicted_s is not None:
            begins_s.append(each.elapsed_s - predicted_s)
    return HostTimes(turnaround_s=_mean(turnarounds_s), decode_begin_s=max(0.0, _mean(begins_s)))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
