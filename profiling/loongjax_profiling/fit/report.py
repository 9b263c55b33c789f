"""What a fit is worth, in words: errors by strategy and form, and the points that it meets worst."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from loongjax.costmodel.measurement import DecodePoint, Measurements, PrefillPoint
from loongjax.costmodel.model import FittedModel, StrategyTimes
from loongjax.costmodel.relative_error import FitErrors
from loongjax.costmodel.work import DecodeTotals

NUM_WORST = 8
"""Points that are named."""


@dataclasses.dataclass(frozen=True)
class Residual:
    """A measured point beside its prediction."""

    what: str
    measured_s: float
    predicted_s: float

    @property
    def relative_error(self) -> float:
        return self.predicted_s / self.measured_s - 1.0

    def __str__(self) -> str:
        return (
            f"{self.relative_error:+7.1%}  {self.what}: "
            f"{1e3 * self.measured_s:.3f} ms measured, {1e3 * self.predicted_s:.3f} ms predicted"
        )


def format_report(model: FittedModel, measurements: Measurements) -> str:
    """Errors by strategy, held-out errors over all of them, and the worst points."""
    lines = [f"{'':9} {'':15} {'training points':26} {'held-out points':26}"]
    lines.append(f"{'':9} {'':15} {'mean':>7} {'geo.':>7} {'number':>7}    {'mean':>7} {'geo.':>7} {'number':>7}")
    forms = list(_forms(model))
    lines += [f"{strategy:9} {form:15} {_columns(errors)}" for strategy, form, errors in forms]
    for form in dict.fromkeys(form for _, form, _ in forms):
        held_out = [errors.held_out for _, other, errors in forms if other == form and errors.held_out is not None]
        if held_out:
            counts = np.array([errors.num_points for errors in held_out])
            means = np.array([errors.arithmetic_mean for errors in held_out])
            lines.append(f"{form}, held out, all strategies: {float(means @ counts / counts.sum()):.2%} mean")
    lines.append("worst points:")
    worst = sorted(residuals(model, measurements), key=lambda residual: -abs(residual.relative_error))
    lines += [f"  {residual}" for residual in worst[:NUM_WORST]]
    return "\n".join(lines)


def residuals(model: FittedModel, measurements: Measurements) -> Iterator[Residual]:
    """Every point of a fitted strategy beside what the scheduler will reckon with, padded as where it was measured."""
    for point in measurements.prefills:
        if point.strategy in model.strategies:
            work = point.work
            predicted_s = _times_at(model, point).prefill_s(work.totals).item()
            kind = "prefill" if not work.is_extend else f"extend, behind up to {max(work.past_lens)},"
            what = f"{kind} of {len(work.new_lens)} x {max(work.new_lens)} on {point.strategy}"
            yield Residual(what, point.measured_s, predicted_s)
    for point in measurements.decodes:
        if point.strategy in model.strategies:
            predicted_s = _times_at(model, point).decode.seconds(DecodeTotals.of([point.work])).item()
            rows, keys = sum(point.work.rows), sum(point.work.keys)
            what = f"decode of {rows} rows, {keys} keys, {point.work.num_masters} masters on {point.strategy}"
            yield Residual(what, point.measured_s, predicted_s)
    if model.migration is not None:
        for point in measurements.migrations:
            predicted_s = model.migration_s(point.num_tokens, point.tp)
            yield Residual(f"migration of {point.num_tokens} tokens, tp{point.tp}", point.measured_s, predicted_s)


def _times_at(model: FittedModel, point: PrefillPoint | DecodePoint) -> StrategyTimes:
    padding = point.padding
    return model.times(point.strategy).padded_to(padding.token_buckets, padding.row_buckets)


def _forms(model: FittedModel) -> Iterator[tuple[str, str, FitErrors]]:
    for strategy in sorted(model.strategies):
        times = model.strategies[strategy]
        for form, errors in (
            ("prefill, paper", times.paper_prefill_errors),
            ("prefill, ours", times.refined_prefill_errors),
            ("extend", times.extend_errors),
            ("decode", times.decode_errors),
        ):
            if errors is not None:
                yield str(strategy), form, errors
    if model.migration_errors is not None:
        yield "all", "migration", model.migration_errors


def _columns(errors: FitErrors) -> str:
    parts = []
    for part in (errors.training, errors.held_out):
        if part is None:
            parts.append(f"{'none':>7}")
        else:
            parts.append(f"{part.arithmetic_mean:7.2%} {part.geometric_mean:7.2%} {part.num_points:7d}")
    return "    ".join(parts)
