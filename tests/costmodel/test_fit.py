import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from loongjax.costmodel.fit import fit, held_out
from loongjax.costmodel.measurement import DecodePoint, Measurements, MigrationPoint, Padding, PrefillPoint
from loongjax.costmodel.work import DecodeTotals, DecodeWork, PrefillTotals, PrefillWork, Strategy
from loongjax.errors import ConfigError
from tests.costmodel.shapes import LLAMA2_7B, MIGRATION, PROVENANCE, decode, measurements, refined

ONE, FOUR = Strategy(1, 2), Strategy(4, 2)


def test_points_without_noise_give_back_the_times_they_came_from():
    model = fit(measurements((ONE, FOUR)))
    unseen = PrefillTotals.of([
        PrefillWork(new_lens=(1,)),
        PrefillWork(new_lens=(333, 12_000)),
        PrefillWork(new_lens=(2000,), past_lens=(100_000,)),
        PrefillWork(new_lens=(100, 1, 1), past_lens=(0, 30_000, 700)),
        PrefillWork(new_lens=(300_000,)),
    ])  # fmt: skip
    for strategy in (ONE, FOUR):
        np.testing.assert_allclose(model.prefill_s(strategy, unseen), refined(strategy.sp).seconds(unseen), rtol=1e-6)
        steps = DecodeTotals.even(strategy, [1, 40, 64], [500, 90_000, 10**6], [1, 1, strategy.sp])
        np.testing.assert_allclose(model.decode_s(strategy, steps), decode(strategy.sp).seconds(steps), rtol=1e-6)
    for size in (77, 10**6):
        assert model.migration_s(size, 2) == pytest.approx(MIGRATION.seconds(size, LLAMA2_7B, 2))


def test_the_papers_coefficients_are_recovered_from_times_in_its_form():
    works = [PrefillWork(new_lens=(n,) * b) for b in (1, 2, 8) for n in (10, 100, 1000, 10_000, 100_000)]
    prefills = tuple(
        PrefillPoint(
            strategy=ONE, work=work, measured_s=0.0169 + 7.98e-5 * work.num_tokens + 2.51e-9 * work.squared_lens
        )
        for work in works
    )
    model = fit(Measurements(provenance=PROVENANCE, prefills=prefills, decodes=measurements((ONE,)).decodes))
    paper = model.times(ONE).paper_prefill
    assert paper.constant_s == pytest.approx(0.0169, rel=1e-6)
    assert paper.per_token_s == pytest.approx(7.98e-5, rel=1e-6)
    assert paper.per_squared_token_s == pytest.approx(2.51e-9, rel=1e-6)
    errors = model.times(ONE).paper_prefill_errors
    assert errors is not None
    assert errors.held_out is not None
    assert errors.training.arithmetic_mean < 1e-8
    assert errors.held_out.arithmetic_mean < 1e-8


def test_points_of_engines_that_pad_to_other_sizes_are_fitted_together():
    """As one database holds them that was measured by several versions: every point counts what was computed."""
    whole = measurements((FOUR,))
    other = Padding(token_buckets=(64, 512, 768, 8192, 32_768), row_buckets=(2, 100))
    prefill = dataclasses.replace(refined(4), token_buckets=other.token_buckets)
    decode_time = dataclasses.replace(decode(4), row_buckets=other.row_buckets)
    mixed = dataclasses.replace(
        whole,
        prefills=tuple(
            dataclasses.replace(point, padding=other, measured_s=prefill.seconds(point.work.totals).item())
            if number % 2
            else point
            for number, point in enumerate(whole.prefills)
        ),
        decodes=tuple(
            dataclasses.replace(
                point, padding=other, measured_s=decode_time.seconds(DecodeTotals.of([point.work])).item()
            )
            if number % 2
            else point
            for number, point in enumerate(whole.decodes)
        ),
    )
    times = fit(mixed).times(FOUR)
    unseen = PrefillTotals.of([PrefillWork(new_lens=(n,), past_lens=(9_000,)) for n in (9, 2_500, 5_000, 90_000)])
    np.testing.assert_allclose(times.prefill_s(unseen), prefill.seconds(unseen), rtol=1e-6)
    steps = DecodeTotals.even(FOUR, [1, 40, 64], [500, 90_000, 10**6])
    np.testing.assert_allclose(times.decode.seconds(steps), decode_time.seconds(steps), rtol=1e-6)
    for errors in (times.refined_prefill_errors, times.extend_errors, times.decode_errors):
        assert errors is not None
        assert errors.held_out is not None
        assert errors.held_out.largest < 1e-6


def without_extends(whole: Measurements) -> Measurements:
    return dataclasses.replace(whole, prefills=tuple(point for point in whole.prefills if not point.work.is_extend))


def test_the_coefficients_of_extends_are_recovered_from_chunks_with_and_without_decodes():
    for strategy in (ONE, FOUR):
        times = fit(measurements((strategy,))).times(strategy)
        true, form = refined(strategy.sp), times.refined_prefill
        assert form is not None
        assert form.extend_constant_s == pytest.approx(true.extend_constant_s, rel=1e-6)
        assert form.per_new_times_past_s == pytest.approx(true.per_new_times_past_s, rel=1e-6)
        assert form.per_past_key_s == pytest.approx(true.per_past_key_s, rel=1e-6)
        assert times.extend_errors is not None
        assert times.extend_errors.held_out is not None
        assert times.extend_errors.held_out.largest < 1e-6


def test_extends_move_nothing_that_whole_prompts_and_decodes_take():
    whole = measurements((ONE,), noise=0.1)
    plain, times = (fit(points).times(ONE) for points in (without_extends(whole), whole))
    assert plain.refined_prefill is not None
    assert times.refined_prefill is not None
    assert times.extend_errors is not None
    assert times.refined_prefill != plain.refined_prefill
    past = {name: getattr(plain.refined_prefill, name) for name in PAST_COEFFICIENTS}
    form = dataclasses.replace(times.refined_prefill, **past)
    assert dataclasses.replace(times, refined_prefill=form, extend_errors=None) == plain


PAST_COEFFICIENTS = ("extend_constant_s", "per_new_times_past_s", "per_past_key_s")


@pytest.mark.parametrize("num_extends", [0, 4])
def test_without_measured_extends_a_pair_costs_what_it_costs_within_a_prompt_and_a_key_what_in_a_decode_step(
    num_extends,
):
    whole = measurements((ONE,))
    extends = tuple(point for point in whole.prefills if point.work.is_extend)[:num_extends]
    fresh = without_extends(whole)
    times = fit(dataclasses.replace(fresh, prefills=fresh.prefills + extends)).times(ONE)
    form = times.refined_prefill
    assert form is not None
    assert form.extend_constant_s == 0.0
    assert form.per_new_times_past_s == 2.0 * form.per_squared_token_s > 0.0
    assert form.per_past_key_s == times.decode.per_key_s > 0.0
    assert times.extend_errors is None


def test_extends_that_are_shorter_than_their_new_tokens_make_the_past_cost_nothing_rather_than_less():
    whole = measurements((ONE,))
    fast = tuple(
        dataclasses.replace(point, measured_s=0.9 * refined(1).new_tokens_s(point.work.totals).item())
        if point.work.is_extend
        else point
        for point in whole.prefills
    )
    form = fit(dataclasses.replace(whole, prefills=fast)).times(ONE).refined_prefill
    assert form is not None
    assert [getattr(form, name) for name in PAST_COEFFICIENTS] == [0.0, 0.0, 0.0]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_with_noise_held_out_points_are_met_about_as_closely_as_the_noise(seed):
    model = fit(measurements((FOUR,), noise=0.02, seed=seed))
    times = model.times(FOUR)
    for errors in (times.refined_prefill_errors, times.extend_errors, times.decode_errors):
        assert errors is not None
        assert errors.held_out is not None
        assert errors.training.arithmetic_mean <= 0.03
        assert errors.held_out.arithmetic_mean <= 0.06
        assert errors.training.geometric_mean <= errors.training.arithmetic_mean


def test_the_refined_form_beats_the_papers_where_the_engine_pads_and_has_a_floor():
    times = fit(measurements((FOUR,), noise=0.01)).times(FOUR)
    assert times.refined_prefill_errors is not None
    assert times.paper_prefill_errors is not None
    assert times.refined_prefill_errors.training.arithmetic_mean < times.paper_prefill_errors.training.arithmetic_mean


@pytest.mark.parametrize("rows", [64.0, 150.0])
def test_where_decodes_become_bound_by_computing_is_found(rows):
    whole = measurements((FOUR,))
    true = dataclasses.replace(
        decode(4), row_buckets=(1, 4, 16, 64, 256, 1024), compute_bound_rows=rows, per_compute_bound_row_s=3e-5
    )
    works = [
        DecodeWork(rows=(count,), keys=(count * context,) * 4)
        for count in (1, 4, 16, 64, 256, 512, 1024)
        for context in (50, 1000, 9000)
    ]
    decodes = tuple(
        DecodePoint(
            strategy=FOUR,
            work=work,
            measured_s=true.seconds(DecodeTotals.of([work])).item(),
            padding=Padding(row_buckets=true.row_buckets),
        )
        for work in works
    )
    found = fit(dataclasses.replace(whole, decodes=decodes)).times(FOUR).decode
    unseen = DecodeTotals.even(FOUR, [3, 30, 200, 800, 1024], [9000, 10**5, 10**6, 10**5, 10**4])
    np.testing.assert_allclose(found.seconds(unseen), true.seconds(unseen), rtol=1e-2)
    assert found.compute_bound_rows == pytest.approx(rows, rel=0.2)


def test_no_kink_is_found_where_there_is_none():
    found = fit(measurements((FOUR,), noise=0.01)).times(FOUR).decode
    assert found.per_compute_bound_row_s == 0.0


def test_held_out_points_do_not_move_the_fit():
    whole = measurements((ONE,))
    fresh = [point for point in whole.prefills if not point.work.past_lens]
    sizes = PrefillTotals.of([point.work for point in fresh]).twice_num_pairs
    kept_out = held_out([point.work for point in fresh], sizes)
    assert kept_out.any()
    wrong = tuple(
        dataclasses.replace(p, measured_s=p.measured_s * (3.0 if out else 1.0))
        for p, out in zip(fresh, kept_out, strict=True)
    )
    right = fit(Measurements(provenance=PROVENANCE, prefills=tuple(fresh), decodes=whole.decodes)).times(ONE)
    moved = fit(Measurements(provenance=PROVENANCE, prefills=wrong, decodes=whole.decodes)).times(ONE)
    assert moved.paper_prefill == right.paper_prefill
    assert moved.paper_prefill_errors is not None
    assert moved.paper_prefill_errors.held_out is not None
    assert moved.paper_prefill_errors.held_out.arithmetic_mean > 0.4


@given(st.lists(st.integers(0, 40), min_size=1, max_size=120))
def test_repeated_works_stay_on_one_side_and_the_extremes_in_the_fit(works):
    kept_out = held_out(works, np.asarray(works, float))
    sides = {work: {bool(out) for w, out in zip(works, kept_out, strict=True) if w == work} for work in works}
    assert all(len(side) == 1 for side in sides.values())
    assert sides[min(works)] == sides[max(works)] == {False}
    distinct = len(set(works))
    num_out = sum(side == {True} for side in sides.values())
    assert num_out == 0 if distinct < 8 else distinct // 5 - 1 <= num_out <= distinct // 5 + 1


def test_a_strategy_with_few_points_is_refused_by_name():
    whole = measurements((ONE,))
    with pytest.raises(ConfigError, match=r"sp1 tp2 has 4 decode steps.*at least 5"):
        fit(Measurements(provenance=PROVENANCE, prefills=whole.prefills, decodes=whole.decodes[:4]))
    chunks = tuple(point for point in whole.prefills if point.work.past_lens)
    with pytest.raises(ConfigError, match="sp1 tp2 has 0 prefills without past tokens"):
        fit(Measurements(provenance=PROVENANCE, prefills=chunks, decodes=whole.decodes))


def test_nothing_measured_is_refused():
    with pytest.raises(ConfigError, match="no measured points"):
        fit(Measurements(provenance=PROVENANCE))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_is_none_is_refused(bad):
    with pytest.raises(ConfigError, match="measured time"):
        PrefillPoint(strategy=ONE, work=PrefillWork(new_lens=(1,)), measured_s=bad)
    with pytest.raises(ConfigError, match="measured time"):
        MigrationPoint(tp=1, num_tokens=1, measured_s=bad)


def test_a_decode_names_the_keys_of_every_instance():
    with pytest.raises(ConfigError, match="keys on 4 instances"):
        DecodePoint(strategy=FOUR, work=DecodeWork(rows=(1,), keys=(10,)), measured_s=1.0)


def test_what_was_not_measured_is_refused():
    whole = measurements((ONE,))
    model = fit(Measurements(provenance=PROVENANCE, prefills=whole.prefills, decodes=whole.decodes))
    with pytest.raises(ConfigError, match=r"nothing of sp4 tp2, only of sp1 tp2"):
        model.prefill_s(FOUR, PrefillTotals.of_sums(1, 1))
    with pytest.raises(ConfigError, match="no migration time"):
        model.migration_s(10, 2)
