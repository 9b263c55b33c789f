"""Each form of time against numbers worked by hand, and its order."""

import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from loongjax.costmodel.decode_time import DecodeTime
from loongjax.costmodel.migration_time import MigrationTime
from loongjax.costmodel.model import StrategyTimes
from loongjax.costmodel.model_shape import ModelShape
from loongjax.costmodel.prefill_time import PaperPrefillTime, RefinedPrefillTime
from loongjax.costmodel.work import DecodeTotals, DecodeWork, PrefillTotals, PrefillWork, Strategy
from loongjax.errors import ConfigError

PAPER = PaperPrefillTime(constant_s=0.02, per_token_s=1e-4, per_squared_token_s=1e-9)
REFINED = RefinedPrefillTime(
    floor_s=0.01,
    constant_s=0.004,
    per_padded_token_s=2e-5,
    per_squared_token_s=1e-9,
    extend_constant_s=0.001,
    per_new_times_past_s=3e-9,
    per_past_key_s=4e-8,
    sp=2,
    token_buckets=(64, 256, 1024),
)
DECODE = DecodeTime(
    constant_s=0.004,
    per_padded_row_s=1e-5,
    per_key_s=1e-8,
    per_exchanged_row_s=1e-6,
    per_extra_master_s=1e-4,
    sp=2,
    row_buckets=(1, 4, 16),
)
KINKED = dataclasses.replace(DECODE, compute_bound_rows=4.0, per_compute_bound_row_s=3e-5)
lengths = st.integers(1, 100_000)


def test_the_papers_form_is_a_constant_tokens_and_squares():
    # 0.02 + 1e-4 (1000 + 2000) + 1e-9 (1e6 + 4e6)
    seconds = PAPER.seconds(PrefillWork(new_lens=(1000, 2000)).totals)
    assert seconds.item() == pytest.approx(0.02 + 0.3 + 0.005)


def test_the_refined_form_pads_the_tokens_of_one_rank():
    # 2000 tokens on 2 ranks: 1000 on one, padded to 1024; squares of 1998 and 2
    work = PrefillWork(new_lens=(1998, 2))
    expected = 0.004 + 1024 * 2e-5 + 1e-9 * (1998**2 + 4)
    assert REFINED.seconds(work.totals).item() == pytest.approx(expected)


EXTEND = PrefillWork(new_lens=(300, 1, 1), past_lens=(1000, 40_000, 60_000))
"""302 tokens, 151 on one of 2 ranks, padded to 256; 400,000 pairs with past tokens, and 50,500 keys on each rank."""
PAST_S = 0.001 + 3e-9 * 400_000 + 4e-8 * 50_500


def test_what_is_past_comes_on_top_of_the_new_tokens():
    new_s = 0.004 + 256 * 2e-5 + 1e-9 * (90_000 + 2)
    assert new_s < 0.01, "else the floor, which is reading weights, would not show"
    assert REFINED.new_tokens_s(EXTEND.totals).item() == 0.01
    assert REFINED.seconds(EXTEND.totals).item() == pytest.approx(0.01 + PAST_S)
    long = PrefillWork(new_lens=(2000, 1, 1), past_lens=(150, 40_000, 60_000))
    expected = 0.004 + 1001 * 2e-5 + 1e-9 * (4e6 + 2) + PAST_S - 4e-8 * 850 / 2
    unpadded = dataclasses.replace(REFINED, token_buckets=())
    assert unpadded.seconds(long.totals).item() == pytest.approx(expected)


def test_a_first_chunk_takes_what_its_tokens_take_as_a_prompt_and_the_constant_of_an_extend():
    chunk, prompt = (PrefillWork(new_lens=(2000,), past_lens=past_lens) for past_lens in ((0,), ()))
    assert REFINED.seconds(chunk.totals).item() == pytest.approx(REFINED.seconds(prompt.totals).item() + 0.001)


def test_an_extend_in_the_papers_form_reads_a_key_as_long_as_a_decode_step_does():
    times = StrategyTimes(paper_prefill=PAPER, decode=DECODE)
    # 0.02 + 1e-4 x 302 + 1e-9 (300^2 + 2 + 2 x 400,000) + 1e-8 x 50,500
    expected = 0.02 + 0.0302 + 1e-9 * 890_002 + 0.000505
    assert times.prefill_s(EXTEND.totals).item() == pytest.approx(expected)


@pytest.mark.parametrize("refined", [None, REFINED])
def test_prompts_alone_take_what_their_form_says(refined):
    times = StrategyTimes(paper_prefill=PAPER, refined_prefill=refined, decode=DECODE)
    totals = PrefillTotals.of_sums([10, 5000, 70_000], [100, 25e6, 49e8])
    np.testing.assert_array_equal(times.prefill_s(totals), times.prefill.seconds(totals))


def test_the_refined_form_is_never_below_its_floor():
    assert REFINED.seconds(PrefillWork(new_lens=(10,)).totals).item() == 0.01


@pytest.mark.parametrize(("num_tokens", "padded"), [(1, 64), (128, 64), (129, 256), (2048, 1024), (2049, 1025)])
def test_a_rank_is_padded_to_the_smallest_bucket_that_holds_it_and_not_beyond_the_largest(num_tokens, padded):
    totals = PrefillTotals.of_sums(num_tokens, 0)
    seconds = dataclasses.replace(REFINED, floor_s=0.0).seconds(totals).item()
    assert seconds == pytest.approx(REFINED.constant_s + padded * REFINED.per_padded_token_s)


def test_a_decode_step_adds_up_what_the_slowest_instance_does():
    # 5 rows, the busier of 2 masters has 3, padded to 4
    work = DecodeTotals.of([DecodeWork(rows=(3, 2), keys=(30_000, 10_000))])
    expected = 0.004 + 4 * 1e-5 + 30_000 * 1e-8 + 5 * 1e-6 + 1e-4
    np.testing.assert_allclose(DECODE.seconds(work), [expected])


def test_rows_beyond_where_computing_takes_over_cost_more():
    # Both are padded: 4 rows are not beyond it, and of 16 there are 12.
    few, many = (DecodeTotals.of([DecodeWork(rows=(rows,), keys=(100, 100))]) for rows in (3, 5))
    np.testing.assert_allclose(KINKED.seconds(few), DECODE.seconds(few))
    np.testing.assert_allclose(KINKED.seconds(many), DECODE.seconds(many) + 12 * 3e-5)


def test_a_term_that_starts_late_is_the_longer_of_reading_and_computing():
    # Weights read in 3 ms, a row computed in 20 us: 150 rows.
    form = dataclasses.replace(
        DECODE, sp=1, constant_s=0.003, per_padded_row_s=0.0, compute_bound_rows=150.0, per_compute_bound_row_s=2e-5
    )
    rows = np.array([1.0, 140.0, 160.0, 1000.0])
    seconds = dataclasses.replace(form, row_buckets=(), per_key_s=0.0).seconds(
        DecodeTotals.even(Strategy(1), rows, rows)
    )
    np.testing.assert_allclose(seconds, np.maximum(0.003, 2e-5 * rows))


def test_one_instance_exchanges_nothing():
    alone = DecodeTime(
        constant_s=0.004,
        per_padded_row_s=1e-5,
        per_key_s=1e-8,
        per_exchanged_row_s=1.0,
        per_extra_master_s=1.0,
        sp=1,
        row_buckets=(),
    )
    seconds = alone.seconds(DecodeTotals.of([DecodeWork(rows=(3,), keys=(1000,))]))
    np.testing.assert_allclose(seconds, [0.004 + 3e-5 + 1e-5])


def test_features_times_coefficients_are_the_seconds():
    totals = PrefillTotals.of([PrefillWork(new_lens=(500, 3)), PrefillWork(new_lens=(9000,), past_lens=(77,))])
    np.testing.assert_allclose(PaperPrefillTime.features(totals) @ [0.02, 1e-4, 1e-9], PAPER.seconds(totals))
    # 252 and 4,500 tokens on each of two ranks
    linear = RefinedPrefillTime.features(totals, np.array([256, 4500])) @ [0.004, 2e-5, 1e-9]
    np.testing.assert_allclose(np.maximum(linear, 0.01), REFINED.new_tokens_s(totals))
    past = RefinedPrefillTime.past_features(totals, 2) @ [0.001, 3e-9, 4e-8]
    np.testing.assert_allclose(np.maximum(linear, 0.01) + past, REFINED.seconds(totals))
    steps = DecodeTotals.of([DecodeWork(rows=(3, 2), keys=(300, 10)), DecodeWork(rows=(20,), keys=(0, 5000))])
    linear = DecodeTime.features(steps, np.array([4, 20]), 2, 4.0) @ [0.004, 1e-5, 3e-5, 1e-8, 1e-6, 1e-4]
    np.testing.assert_allclose(linear, KINKED.seconds(steps))


@pytest.mark.parametrize(("sp", "exchanges"), [(1, 0.0), (4, 1.0)])
def test_what_the_coefficients_of_a_decode_step_multiply_by_hand(sp: int, exchanges: float):
    """Few and many rows of 3 masters, by little and much of keys; computing takes over at 10 rows."""
    rows, keys = np.array([[3.0], [12.0]]), np.array([100.0, 900.0])
    totals = DecodeTotals(num_rows=rows, num_masters=np.array(3.0), busiest_rows=rows, busiest_keys=keys)
    features = DecodeTime.features(totals, np.array([[4.0], [16.0]]), sp, 10.0)
    few = [[1.0, 4.0, 0.0, num_keys, 3.0 * exchanges, 2.0 * exchanges] for num_keys in (100.0, 900.0)]
    many = [[1.0, 16.0, 6.0, num_keys, 12.0 * exchanges, 2.0 * exchanges] for num_keys in (100.0, 900.0)]
    assert features.tolist() == [few, many]


def test_what_the_coefficients_of_a_prefill_multiply_by_hand():
    """Of a prompt and of two, by two sizes that they are padded to."""
    totals = PrefillTotals.of_sums(np.array([[30], [70]]), np.array([[900], [2500]]))
    papers, refined = PaperPrefillTime.features(totals), RefinedPrefillTime.features(totals, np.array([64.0, 128.0]))
    assert papers.tolist() == [[[1.0, 30.0, 900.0]], [[1.0, 70.0, 2500.0]]]
    assert refined.tolist() == [[[1.0, padded, squared] for padded in (64.0, 128.0)] for squared in (900.0, 2500.0)]


def test_a_migration_takes_its_latency_and_each_devices_heads_over_the_bandwidth():
    model = ModelShape(
        hidden_size=4096,
        num_layers=32,
        num_q_heads=32,
        num_kv_heads=32,
        head_dim=128,
        intermediate_size=11008,
        vocab_size=32000,
    )
    # The reference hard-codes 400 GiB/s: 100k tokens of 512 KiB with 2 devices an instance took it 61 ms.
    time = MigrationTime(latency_s=0.001, per_byte_s=1 / (400 * 2**30))
    assert time.seconds(100_000, model, 2) == pytest.approx(0.001 + 0.0610, abs=1e-4)


@given(st.lists(lengths, min_size=1, max_size=5), lengths, st.integers(0, 100_000))
def test_one_more_request_never_makes_a_prefill_faster(new_lens, more, past):
    fewer = PrefillWork(new_lens=tuple(new_lens)).totals
    work = PrefillWork(new_lens=(*new_lens, more), past_lens=(0,) * len(new_lens) + (past,))
    for form in (PAPER, REFINED):
        assert form.seconds(work.totals) >= form.seconds(fewer)


@given(st.integers(1, 500), st.integers(0, 500), st.integers(500, 10**6), st.integers(0, 10**6))
def test_more_rows_or_keys_never_make_a_decode_step_faster(rows, more_rows, keys, more_keys):
    totals = DecodeTotals.of([
        DecodeWork(rows=(rows,), keys=(keys, 0)),
        DecodeWork(rows=(rows + more_rows,), keys=(keys + more_rows + more_keys, 0)),
    ])  # fmt: skip
    few, many = DECODE.seconds(totals)
    assert many >= few


def test_candidates_on_a_grid_broadcast():
    num_tokens = np.arange(1.0, 7.0)[:, None] * np.ones(4)
    totals = PrefillTotals.of_sums(num_tokens, num_tokens**2)
    for form in (PAPER, REFINED):
        grid = form.seconds(totals)
        assert grid.shape == (6, 4)
        assert grid[5, 3] == form.seconds(PrefillTotals.of_sums(6, 36)).item()


@pytest.mark.parametrize("bad", [-1e-9, float("nan"), float("inf")])
def test_a_coefficient_that_is_no_time_is_refused(bad):
    with pytest.raises(ConfigError, match="per_token_s"):
        PaperPrefillTime(constant_s=0.0, per_token_s=bad, per_squared_token_s=0.0)


@pytest.mark.parametrize("buckets", [(0, 4), (4, 4), (8, 4)])
def test_buckets_out_of_order_are_refused(buckets):
    with pytest.raises(ConfigError, match="row_buckets"):
        dataclasses.replace(DECODE, row_buckets=buckets)
    with pytest.raises(ConfigError, match="token_buckets"):
        dataclasses.replace(REFINED, token_buckets=buckets)


@given(num_tokens=lengths, num_rows=st.integers(1, 40))
def test_a_number_takes_exactly_what_an_array_of_it_takes(num_tokens: int, num_rows: int):
    """Also where sizes are padded, and beyond the last bucket."""
    squared = num_tokens * num_tokens
    for form in (PAPER, REFINED):
        single = form.seconds(PrefillTotals.of_batch(num_tokens, squared))
        assert [single] == form.seconds(PrefillTotals.of_sums(num_tokens, squared)).tolist()
    step = DecodeWork(rows=(num_rows,), keys=(num_tokens + num_rows,))
    for form in (DECODE, KINKED):
        single = form.seconds(DecodeTotals.of_even_rows(num_rows, num_tokens + num_rows))
        assert [single] == form.seconds(DecodeTotals.of([step])).tolist()


def test_coefficients_hold_for_an_engine_that_pads_to_other_sizes():
    form = StrategyTimes(paper_prefill=PAPER, refined_prefill=REFINED, decode=DECODE).padded_to((1500,), (2, 8))
    # 1000 tokens on each of 2 ranks, and 5 rows of one master
    prefill, step = PrefillWork(new_lens=(2000,)).totals, DecodeTotals.of([DecodeWork(rows=(5,), keys=(50, 50))])
    assert form.prefill_s(prefill).item() - REFINED.seconds(prefill).item() == pytest.approx((1500 - 1024) * 2e-5)
    saved_rows = (16 - 8) * DECODE.per_padded_row_s
    assert DECODE.seconds(step).item() - form.decode.seconds(step).item() == pytest.approx(saved_rows)


def test_what_does_not_pad_pads_nowhere():
    unpadded = dataclasses.replace(REFINED, token_buckets=()), dataclasses.replace(DECODE, row_buckets=())
    for prefill in (None, unpadded[0]):
        times = StrategyTimes(paper_prefill=PAPER, refined_prefill=prefill, decode=unpadded[1])
        assert times.padded_to((128,), (2, 8)) == times
