"""From measurements to a model: fits for each strategy, with errors on points that the fit has not seen."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Hashable, Sequence

import numpy as np

from loongjax.costmodel.coefficients import pad
from loongjax.costmodel.decode_time import DecodeTime
from loongjax.costmodel.floor import fit_with_floor
from loongjax.costmodel.measurement import DecodePoint, Measurements, MigrationPoint, PrefillPoint
from loongjax.costmodel.migration_time import MigrationTime
from loongjax.costmodel.model import FittedModel, StrategyTimes
from loongjax.costmodel.model_shape import ModelShape
from loongjax.costmodel.nonnegative import RELATIVE_TIE, fit_nonnegative
from loongjax.costmodel.prefill_time import PaperPrefillTime, RefinedPrefillTime
from loongjax.costmodel.relative_error import FitErrors, RelativeErrors
from loongjax.costmodel.work import DecodeTotals, PrefillTotals, Strategy, ceil
from loongjax.errors import ConfigError

HELD_OUT_EVERY = 5
"""One distinct work in so many is held out."""
LEAST_POINTS = 5
"""Fewer points of a strategy say nothing about it."""
KINKS_BETWEEN_SIZES = 6
"""Places tried between two measured numbers of rows for where steps become bound by computing."""


def fit(measurements: Measurements) -> FittedModel:
    """The model of all strategies that were measured. Fewer than 5 extends of one are passed over.

    A point counts what was computed for it, by its own padding; the forms pad to the sizes that go farthest, of equal
    ones those measured last.

    Raises:
        ConfigError: a strategy with fewer than 5 prefills without past tokens, or fewer than 5 decode steps.
    """
    strategies = sorted({point.strategy for point in (*measurements.prefills, *measurements.decodes)})
    if not strategies:
        raise ConfigError("there are no measured points: measure some, and fit again")
    migration, migration_errors = _fit_migration(measurements.migrations, measurements.provenance.model)
    return FittedModel(
        provenance=measurements.provenance,
        strategies={
            strategy: _fit_strategy(
                strategy,
                [point for point in measurements.prefills if point.strategy == strategy],
                [point for point in measurements.decodes if point.strategy == strategy],
            )
            for strategy in strategies
        },
        migration=migration,
        migration_errors=migration_errors,
    )


def held_out(works: Sequence[Hashable], sizes: np.ndarray) -> np.ndarray:
    """Which points the fit may not see: bool [points].

    Every fifth distinct work in order of size (float64 [points]; equal works have equal sizes), so that all scales are
    tested and repeated measurements of one work stay on one side; never the smallest or the largest, which span the
    range. None of fewer than 8 works.
    """
    distinct = {works[index]: None for index in np.argsort(sizes, kind="stable").tolist()}
    if len(distinct) < 8:
        return np.zeros(len(works), bool)
    ranks = {work: rank for rank, work in enumerate(distinct)}
    last = len(distinct) - 1
    return np.asarray([ranks[w] % HELD_OUT_EVERY == HELD_OUT_EVERY // 2 and ranks[w] != last for w in works])


def _fit_strategy(
    strategy: Strategy, prefills: Sequence[PrefillPoint], decodes: Sequence[DecodePoint]
) -> StrategyTimes:
    fresh = [point for point in prefills if not point.work.is_extend]
    for kind, count in (("prefills without past tokens", len(fresh)), ("decode steps", len(decodes))):
        if count < LEAST_POINTS:
            raise ConfigError(
                f"{strategy} has {count} {kind}, and a fit needs at least {LEAST_POINTS}: measure more of them"
            )
    paper, paper_errors = _fit_paper(fresh)
    decode, decode_errors = _fit_decode(strategy, decodes)
    refined, refined_errors = _fit_refined(strategy, fresh, decode.per_key_s)
    refined, extend_errors = _fit_extend(refined, [point for point in prefills if point.work.is_extend])
    return StrategyTimes(
        paper_prefill=paper,
        paper_prefill_errors=paper_errors,
        refined_prefill=refined,
        refined_prefill_errors=refined_errors,
        extend_errors=extend_errors,
        decode=decode,
        decode_errors=decode_errors,
    )


def _fit_paper(points: Sequence[PrefillPoint]) -> tuple[PaperPrefillTime, FitErrors]:
    totals = PrefillTotals.of([point.work for point in points])
    measured_s, kept_out = _measured_and_held_out(points, totals.twice_num_pairs)
    features = PaperPrefillTime.features(totals)
    constant, per_token, per_square = fit_nonnegative(features[~kept_out], measured_s[~kept_out]).tolist()
    paper = PaperPrefillTime(constant_s=constant, per_token_s=per_token, per_squared_token_s=per_square)
    return paper, _errors(paper.seconds(totals), measured_s, kept_out)


def _fit_refined(
    strategy: Strategy, points: Sequence[PrefillPoint], per_key_s: float
) -> tuple[RefinedPrefillTime, FitErrors]:
    """The form on whole prompts; what is past takes what it takes elsewhere, a key `per_key_s` as in a decode step."""
    totals = PrefillTotals.of([point.work for point in points])
    measured_s, kept_out = _measured_and_held_out(points, totals.twice_num_pairs)
    ladders = [point.padding.token_buckets for point in points]
    features = RefinedPrefillTime.features(totals, _pad_each(totals.num_tokens / strategy.sp, ladders))
    floor, coefficients = fit_with_floor(features[~kept_out], measured_s[~kept_out])
    constant, per_token, per_square = coefficients.tolist()
    refined = RefinedPrefillTime(
        floor_s=floor,
        constant_s=constant,
        per_padded_token_s=per_token,
        per_squared_token_s=per_square,
        extend_constant_s=0.0,
        # A pair is as much work as within a prompt, where len^2 / 2 of them are.
        per_new_times_past_s=2.0 * per_square,
        per_past_key_s=per_key_s,
        sp=strategy.sp,
        token_buckets=_farthest(ladders),
    )
    return refined, _errors(np.maximum(features @ coefficients, floor), measured_s, kept_out)


def _fit_extend(
    prefill: RefinedPrefillTime, points: Sequence[PrefillPoint]
) -> tuple[RefinedPrefillTime, FitErrors | None]:
    """The same on whole prompts, with what past tokens take on top of that; as it was if there are too few extends.

    Not fitted together with whole prompts: extends run through other kernels and are many more points, so that prompts
    would be off by 10% instead of 3% (an 8B on an H200).
    """
    if len(points) < LEAST_POINTS:
        return prefill, None
    totals = PrefillTotals.of([point.work for point in points])
    measured_s, kept_out = _measured_and_held_out(points, totals.twice_num_pairs)
    padded = _pad_each(totals.num_tokens / prefill.sp, [point.padding.token_buckets for point in points])
    new_tokens_s = prefill.padded_tokens_s(totals, padded)
    features = RefinedPrefillTime.past_features(totals, prefill.sp)
    coefficients = fit_nonnegative(features[~kept_out], measured_s[~kept_out], new_tokens_s[~kept_out])
    constant, per_pair, per_key = coefficients.tolist()
    extend = dataclasses.replace(
        prefill, extend_constant_s=constant, per_new_times_past_s=per_pair, per_past_key_s=per_key
    )
    return extend, _errors(new_tokens_s + features @ coefficients, measured_s, kept_out)


def _fit_decode(strategy: Strategy, points: Sequence[DecodePoint]) -> tuple[DecodeTime, FitErrors]:
    totals = DecodeTotals.of([point.work for point in points])
    measured_s, kept_out = _measured_and_held_out(points, totals.busiest_keys + totals.num_rows)
    ladders = [point.padding.row_buckets for point in points]
    padded = _pad_each(totals.busiest_rows, ladders)
    form = _fit_decode_form(strategy.sp, totals.at(~kept_out), padded[~kept_out], measured_s[~kept_out])
    decode = dataclasses.replace(form, row_buckets=_farthest(ladders))
    return decode, _errors(decode.padded_rows_s(totals, padded), measured_s, kept_out)


def _fit_decode_form(sp: int, totals: DecodeTotals, padded_rows: np.ndarray, measured_s: np.ndarray) -> DecodeTime:
    """The best over where steps become bound by computing, or without that where it does not pay for itself."""

    def fit_from(compute_bound_rows: float, *, has_kink: bool) -> tuple[float, DecodeTime]:
        features = DecodeTime.features(totals, padded_rows, sp, compute_bound_rows)
        features[:, 2] *= has_kink
        coefficients = fit_nonnegative(features, measured_s)
        constant, per_row, per_bound_row, per_key, per_exchange, per_master = coefficients.tolist()
        form = DecodeTime(
            constant_s=constant,
            per_padded_row_s=per_row,
            compute_bound_rows=compute_bound_rows if per_bound_row else 0.0,
            per_compute_bound_row_s=per_bound_row,
            per_key_s=per_key,
            per_exchanged_row_s=per_exchange,
            per_extra_master_s=per_master,
            sp=sp,
            row_buckets=(),
        )
        return float(np.sum((features @ coefficients / measured_s - 1.0) ** 2)), form

    least, best = fit_from(0.0, has_kink=False)
    num_points = len(measured_s)
    # A kink is two more coefficients: they have to pay for themselves (Akaike's criterion), and not by rounding.
    least = least * math.exp(-4.0 / num_points) - num_points * RELATIVE_TIE**2
    for rows in _kinks(padded_rows):
        squares, form = fit_from(rows, has_kink=True)
        if squares < least - num_points * RELATIVE_TIE**2:
            least, best = squares, form
    return best


def _pad_each(sizes: np.ndarray, ladders: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Each size, in whole numbers, padded by a ladder of its own."""
    return np.array([pad(ceil(size), ladder) for size, ladder in zip(sizes.tolist(), ladders, strict=True)])


def _farthest(ladders: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The ladder that goes farthest, of equal ones the last."""
    return max(reversed(ladders), key=lambda ladder: ladder[-1:])


def _kinks(padded_rows: np.ndarray) -> list[float]:
    """Where the term beyond a kink may begin, ascending: at the sizes measured, and a few times in between."""
    sizes = np.unique(padded_rows)
    return [
        float(rows)
        for low, high in itertools.pairwise(sizes)
        for rows in np.geomspace(low, high, KINKS_BETWEEN_SIZES, endpoint=False)
    ]


def _fit_migration(
    points: Sequence[MigrationPoint], model: ModelShape
) -> tuple[MigrationTime | None, FitErrors | None]:
    if not points:
        return None, None
    sizes = np.asarray([MigrationTime.device_bytes(p.num_tokens, model, p.tp) for p in points])
    measured_s = np.asarray([point.measured_s for point in points])
    kept_out = held_out([(point.num_tokens, point.tp) for point in points], sizes)
    features = np.column_stack([np.ones(len(points)), sizes])
    latency, per_byte = fit_nonnegative(features[~kept_out], measured_s[~kept_out]).tolist()
    migration = MigrationTime(latency_s=latency, per_byte_s=per_byte)
    return migration, _errors(latency + per_byte * sizes, measured_s, kept_out)


def _measured_and_held_out(
    points: Sequence[PrefillPoint] | Sequence[DecodePoint], sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    measured_s = np.asarray([point.measured_s for point in points])
    return measured_s, held_out([point.work for point in points], sizes)


def _errors(predicted_s: np.ndarray, measured_s: np.ndarray, kept_out: np.ndarray) -> FitErrors:
    training = RelativeErrors.of(predicted_s[~kept_out], measured_s[~kept_out])
    assert training is not None, "points are left to fit"
    return FitErrors(training=training, held_out=RelativeErrors.of(predicted_s[kept_out], measured_s[kept_out]))
