"""Figure 3: the same devices cut into fewer or more instances, prefill and decode."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from loongjax.costmodel.work import Strategy
from loongjax_profiling.iteration.case import Case
from loongjax_profiling.plot.times import Times


def draw(times: Times) -> Figure:
    """A bar for each strategy and work, relative to the strategy of fewest instances that was measured.

    Raises:
        ConfigError: no work was measured with that strategy and another.
    """
    grid = times.grid("figure3")
    measured = {case.strategy for case in grid.cases if case in times.seconds}
    base = min(measured, default=None)
    bases = {(case.kind, _work(case)) for case in grid.cases if case in times.seconds and case.strategy == base}
    compared = [case for case in grid.cases if case.strategy != base and (case.kind, _work(case)) in bases]
    compared = {(case.kind, _work(case)) for case in times.require("figure3", compared)}
    cases = times.require("figure3", [case for case in grid.cases if (case.kind, _work(case)) in compared])
    works = [work for work in _works(grid.cases) if work in _works(cases)]
    strategies = sorted({case.strategy for case in cases})
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    figure.suptitle(f"Sequence and tensor parallelism: {times.system}")
    for axes, kind in zip(figure.subplots(1, 2), ("prefill", "decode"), strict=True):
        by_point = {
            (case.strategy, (case.batch_size, case.input_len)): times.seconds[case]
            for case in cases
            if case.kind == kind
        }
        width = 0.8 / len(strategies)
        for index, strategy in enumerate(strategies):
            ratios = [_ratio(by_point, strategies, strategy, work) for work in works]
            centres = np.arange(len(works)) + (index - (len(strategies) - 1) / 2) * width
            axes.bar(centres, ratios, width, label=str(strategy))
        axes.axhline(1.0, color="gray", linestyle="--", linewidth=1)
        axes.set_xlim(-0.5, len(works) - 0.5)
        axes.set_xticks(range(len(works)), [f"{batch_size} x {length:,}" for batch_size, length in works], fontsize=8)
        axes.set_xlabel("requests x tokens")
        axes.set_ylabel(f"{kind} time, relative to {strategies[0]}")
        axes.legend(fontsize="small")
    return figure


def _ratio(
    by_point: dict[tuple[Strategy, tuple[int, int]], float],
    strategies: list[Strategy],
    strategy: Strategy,
    work: tuple[int, int],
) -> float:
    """NaN, which is no bar, where one of the two was not measured."""
    base = by_point.get((strategies[0], work), float("nan"))
    return by_point.get((strategy, work), float("nan")) / base


def _works(cases: tuple[Case, ...] | list[Case]) -> list[tuple[int, int]]:
    return list(dict.fromkeys(map(_work, cases)))


def _work(case: Case) -> tuple[int, int]:
    return case.batch_size, case.input_len
