"""What the host adds to the times of iterations, from those that an engine ran."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np

from loongjax.costmodel.model import CostModel
from loongjax.runtime.simulated import HostTimes
from loongjax_profiling.replay.player import Playback
from loongjax_profiling.replay.traced_runtime import TracedIteration


def measure_host_times(
    playback: Playback, iterations: Sequence[TracedIteration], cost_model: CostModel, tp: int
) -> HostTimes:
    """Medians of what an engine's iterations show, since the first of a kind take several times as long as later ones;
    0 where nothing was measured, or where the model says more than iterations took.

    Args:
        playback: some requests, played.
        iterations: those that it took and that succeeded. What is submitted behind others has no turnaround, and is
            made ready meanwhile.
        cost_model: says what they take without a host.
        tp: devices of an instance.
    """
    turnarounds_s = [each.turnaround_s for each in iterations if each.turnaround_s is not None and not each.continues]
    begins_s: dict[str, list[float]] = collections.defaultdict(list)
    for each in iterations:
        predicted_s = each.predicted_s(cost_model, tp)
        if predicted_s is not None and not (each.continues or each.is_behind):
            begins_s[each.kind].append(each.elapsed_s - predicted_s)
    return HostTimes(
        intake_s=playback.mean_intake_s,
        turnaround_s=_median(turnarounds_s),
        decode_begin_s=max(0.0, _median(begins_s["decode"])),
        prefill_begin_s=max(0.0, _median([*begins_s["prefill"], *begins_s["extend"]])),
        telling_s=playback.mean_telling_s,
    )


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if values else 0.0
