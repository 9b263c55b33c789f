"""Figure 2: how iterations of long and of short requests scale with tensor parallelism."""

from __future__ import annotations

import collections

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loongjax_profiling.iteration.case import Case, Kind
from loongjax_profiling.plot.times import Times

KINDS: tuple[Kind, Kind] = ("prefill", "decode")


def draw(times: Times) -> Figure:
    """Rows: short requests in batches, and long ones alone; columns: prefill and decode. Each series is relative to its
    longest time; works that were measured with one tp alone are no series.

    Raises:
        ConfigError: no series of the figure was measured.
    """
    grid = times.grid("figure2").cases
    num_tps = collections.Counter(_series(case) for case in grid if case in times.seconds)
    cases = times.require("figure2", [case for case in grid if num_tps[_series(case)] > 1])
    batch_sizes = sorted({case.batch_size for case in grid}, reverse=True)
    figure = Figure(figsize=(9, 7), layout="constrained")
    figure.suptitle(f"Tensor parallelism: {times.system}")
    panels = figure.subplots(len(batch_sizes), len(KINDS), sharex=True, sharey=True, squeeze=False)
    for row, batch_size in zip(panels, batch_sizes, strict=True):
        for axes, kind in zip(row, KINDS, strict=True):
            chosen = [case for case in cases if case.kind == kind and case.batch_size == batch_size]
            _draw_panel(axes, times, chosen)
            axes.set_title(f"{kind}, batch size {batch_size}")
    for axes in panels[-1]:
        axes.set_xlabel("devices (tp)")
    for row in panels:
        row[0].set_ylabel("time, relative")
    return figure


def _series(case: Case) -> tuple[str, int, int]:
    return case.kind, case.batch_size, case.input_len


def _draw_panel(axes: Axes, times: Times, cases: list[Case]) -> None:
    tps = sorted({case.strategy.tp for case in cases})
    for input_len in sorted({case.input_len for case in cases}):
        by_tp = {case.strategy.tp: times.seconds[case] for case in cases if case.input_len == input_len}
        longest = max(by_tp.values())
        series = sorted(by_tp)
        axes.plot(series, [by_tp[tp] / longest for tp in series], marker="o", label=f"{input_len} tokens")
    axes.plot(tps, [tps[0] / tp for tp in tps], linestyle="--", color="gray", label="1 / tp")
    axes.set_xticks(tps)
    axes.set_ylim(0.0, 1.05)
    axes.legend(fontsize="small")
