"""What a replay leaves behind: records and iterations of both sides, the comparison, and tables to read."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from loongjax.costmodel.model import CostModel
from loongjax_profiling.json_file import write_json
from loongjax_profiling.replay.comparison import LATENCIES, ReplayComparison
from loongjax_profiling.replay.traced_runtime import TracedIteration


def format_comparison(comparison: ReplayComparison) -> str:
    """The comparison as tables."""
    rows = zip(comparison.latencies, comparison.latencies_as_fitted, comparison.latencies_in_hindsight, strict=True)
    lines = [
        f"{'latency (ms)':<22}{'':>6}{'measured':>12}{'simulated':>12}{'error':>10}"
        f"{'as fitted':>14}{'in hindsight':>14}",
        *[
            f"{LATENCIES[row.latency]:<22}{row.statistic:>6}{_ms(row.measured_s)}{_ms(row.simulated_s)}"
            f"{_percent(row.relative_error)}{_percent(fitted.relative_error):>14}{_percent(hindsight.relative_error):>14}"
            for row, fitted, hindsight in rows
        ],
        "",
        f"{'iterations (ms)':<22}{'DoP':>6}{'measured':>12}{'predicted':>12}{'error':>10}"
        f"{'number':>9}{'turnaround':>12}",
        *[
            f"{each.kind:<22}{each.dop:>6}{_ms(each.measured_s)}{_ms(each.predicted_s)}{_percent(each.relative_error)}"
            f"{each.num_measured:>9}{_ms(each.turnaround_s)}"
            for each in comparison.iterations
        ],
        *[
            f"{each.kind + ', simulated':<22}{each.dop:>6}{'':>12}{_ms(each.simulated_s)}{each.num_simulated:>19}"
            for each in comparison.simulated_iterations
        ],
        "",
        f"measured:  {comparison.elasticity}",
        f"simulated: {comparison.simulated_elasticity}",
    ]
    return "\n".join(lines)


def write_iterations(
    iterations: Sequence[TracedIteration], cost_model: CostModel, tp: int, begin_s: float, path: pathlib.Path
) -> None:
    """One JSON object a line: an iteration of the engine, and what the cost model says of it; times since the begin."""
    with path.open("w", encoding="utf-8") as file:
        for each in iterations:
            row = dataclasses.asdict(each) | {
                "group": each.group.instances,
                "submitted_s": each.submitted_s - begin_s,
                "begin_s": each.begin_s - begin_s,
                "end_s": each.end_s - begin_s,
                "elapsed_s": each.elapsed_s,
                "predicted_s": each.predicted_s(cost_model, tp),
            }
            file.write(json.dumps(row) + "\n")


def write_comparison(comparison: ReplayComparison, about: dict[str, Any], path: pathlib.Path) -> None:
    """One JSON object: the comparison, and under "about" where it comes from."""
    write_json(comparison.as_json() | {"about": about}, path)


def _percent(error: float | None) -> str:
    return f"{'-':>10}" if error is None else f"{error:>+10.1%}"


def _ms(seconds: float | None) -> str:
    return f"{'-':>12}" if seconds is None else f"{1000.0 * seconds:>12.3f}"
