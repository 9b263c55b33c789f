"""Figure 13: what scaling down costs a prefill, and what scaling up brings a decode."""

from __future__ import annotations

import dataclasses

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loongjax_profiling.iteration.case import Case
from loongjax_profiling.plot.times import Times


def draw(times: Times) -> Figure:
    """Left: a prefill that leaves its keys on the fewest instances over one that leaves them on all. Right: a decode
    with several masters over one with a single master.

    Raises:
        ConfigError: no pair of points was measured.
    """
    cases = times.grid("figure13").cases
    down = {_work(case): _over(times, case, scales_down=False) for case in cases if case.scales_down}
    up = {
        number: {_work(case): _over(times, case, num_masters=1) for case in cases if case.num_masters == number}
        for number in sorted({case.num_masters for case in cases if case.num_masters > 1})
    }
    pairs = [case for case in cases if case.scales_down or case.num_masters > 1]
    there = times.require("figure13", [case for case in pairs if _base(case) in times.seconds])
    works = [work for work in dict.fromkeys(map(_work, cases)) if work in set(map(_work, there))]
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    figure.suptitle(f"Scaling down and up on {cases[0].strategy}: {times.system}")
    left, right = figure.subplots(1, 2)
    _draw_series(left, works, {"scaled down": down})
    left.set_ylabel("prefill time with scale-down / without")
    _draw_series(right, works, {f"{number} masters": ratios for number, ratios in up.items()})
    right.set_ylabel("decode time / with one master")
    return figure


def _draw_series(
    axes: Axes, works: list[tuple[int, int]], series: dict[str, dict[tuple[int, int], float | None]]
) -> None:
    for label, ratios in series.items():
        there = [(x, ratio) for x, work in enumerate(works) if (ratio := ratios.get(work)) is not None]
        axes.plot([x for x, _ in there], [ratio for _, ratio in there], marker="o", label=label)
    if not any(ratio is not None for ratios in series.values() for ratio in ratios.values()):
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="gray")
    axes.axhline(1.0, color="gray", linestyle="--", linewidth=1)
    axes.set_ylim(bottom=0.0)
    axes.set_xticks(range(len(works)), [f"{batch_size} x {length:,}" for batch_size, length in works], fontsize=8)
    axes.set_xlabel("requests x tokens")
    axes.legend(fontsize="small")


def _over(times: Times, case: Case, **other: object) -> float | None:
    """A point's time over that of one that differs from it so; None if either was not measured."""
    base = dataclasses.replace(case, **other)
    if case not in times.seconds or base not in times.seconds:
        return None
    return times.seconds[case] / times.seconds[base]


def _base(case: Case) -> Case:
    return dataclasses.replace(case, scales_down=False, num_masters=min(case.num_masters, 1))


def _work(case: Case) -> tuple[int, int]:
    return case.batch_size, case.input_len
