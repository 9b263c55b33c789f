"""Figure 14: prefill times as predicted, and as measured."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from loongjax.costmodel.fit import LEAST_POINTS, fit
from loongjax.costmodel.measurement import Measurements, PrefillPoint
from loongjax.costmodel.work import PrefillTotals
from loongjax.errors import ConfigError

BATCH_SIZES = (1, 2, 4, 8)
MAX_PANELS = 3


def draw(measurements: Measurements, system: str) -> Figure:
    """A panel for each strategy of most devices: lines are predicted by a model, markers measured.

    The model is the one that `fit` makes of them: of 8 different works or more it has not seen every fifth, which are
    drawn all the same.

    Raises:
        ConfigError: no prefill of these batch sizes was measured, or too few of all to fit.
    """
    if not (measurements.prefills and measurements.decodes):
        raise ConfigError(
            f"no strategy has {LEAST_POINTS} prefills and {LEAST_POINTS} decodes, as a fit needs: "
            "`loongjax profile iteration --grid analytical-model --db FILE` measures them"
        )
    whole = [point for point in measurements.prefills if not point.work.is_extend]
    points = [point for point in whole if len(point.work.new_lens) in BATCH_SIZES]
    if not points:
        raise ConfigError(
            f"the database has no prefills of {', '.join(map(str, BATCH_SIZES))} requests: "
            "`loongjax profile iteration --grid analytical-model --db FILE` measures them"
        )
    model = fit(measurements)
    most = max(point.strategy.sp * point.strategy.tp for point in points)
    strategies = sorted({point.strategy for point in points if point.strategy.sp * point.strategy.tp == most})
    strategies = strategies[:MAX_PANELS]
    figure = Figure(figsize=(5 * len(strategies), 4.5), layout="constrained")
    figure.suptitle(f"Predicted (lines) and measured (markers) prefills: {system}")
    for axes, strategy in zip(figure.subplots(1, len(strategies), squeeze=False)[0], strategies, strict=True):
        for batch_size in BATCH_SIZES:
            measured = [p for p in points if p.strategy == strategy and len(p.work.new_lens) == batch_size]
            if not measured:
                continue
            lens = np.array([_input_len(point) for point in measured])
            (markers,) = axes.plot(
                lens, [p.measured_s for p in measured], linestyle="none", marker="x", label=f"batch size {batch_size}"
            )
            grid = np.unique(np.geomspace(lens.min(), lens.max(), 200).round())
            totals = PrefillTotals.of_sums(batch_size * grid, batch_size * grid**2)
            axes.plot(grid, model.prefill_s(strategy, totals), color=markers.get_color(), linewidth=1)
        axes.set_title(str(strategy))
        axes.set_xlabel("tokens of a request")
        axes.set_ylabel("seconds")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.legend(fontsize="small")
    return figure


def _input_len(point: PrefillPoint) -> int:
    return point.work.new_lens[0]
