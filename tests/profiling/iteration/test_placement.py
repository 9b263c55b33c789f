"""Where keys go, and what does not fit."""

import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from loongjax.core.cluster import ClusterShape
from loongjax.costmodel.work import Strategy
from loongjax_profiling.iteration.case import Case
from loongjax_profiling.iteration.placement import masters_of, packed, spread, why_not
from tests.profiling.iteration.scripted_runtime import LIMITS, SHAPE


def prefill(batch_size: int, input_len: int, sp: int = 4, *, scales_down: bool = False) -> Case:
    return Case(
        kind="prefill", strategy=Strategy(sp), batch_size=batch_size, input_len=input_len, scales_down=scales_down
    )


def decode(batch_size: int, input_len: int, sp: int, num_masters: int) -> Case:
    return Case(
        kind="decode", strategy=Strategy(sp), batch_size=batch_size, input_len=input_len, num_masters=num_masters
    )


def extend(input_len: int, past_len: int, num_decodes: int = 0) -> Case:
    return Case(kind="extend", strategy=Strategy(1), input_len=input_len, past_len=past_len, num_decodes=num_decodes)


def refusal(case: Case, **changes) -> str | None:
    limits = dataclasses.replace(LIMITS, **changes)
    return why_not(case, shape=SHAPE, limits=limits, num_steps=19, context_len=10_000)


def pages_by_instance(placements, sp: int, page_size: int) -> np.ndarray:
    pages = np.zeros(sp, int)
    for intervals in placements:
        for interval in intervals:
            pages[interval.instance] += -(-interval.num_tokens // page_size)
    return pages


@given(st.integers(1, 8), st.integers(1, 12), st.integers(1, 500), st.sampled_from([1, 4, 16]))
def test_each_request_is_spread_without_gaps_in_whole_pages(sp, batch_size, input_len, page_size):
    for intervals in spread(prefill(batch_size, input_len, sp), page_size):
        position = 0
        for interval in intervals:
            assert interval.begin == position < interval.end
            assert position % page_size == 0
            position = interval.end
        assert position == input_len
        assert len({interval.instance for interval in intervals}) == len(intervals)


@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 500), st.sampled_from([1, 4, 16]))
def test_a_batch_is_spread_evenly(sp, batch_size, input_len, page_size):
    pages = pages_by_instance(spread(prefill(batch_size, input_len, sp), page_size), sp, page_size)
    assert pages.max() - pages.min() <= min(batch_size, sp)
    if batch_size % sp == 0:
        assert pages.max() == pages.min()


def test_short_requests_are_spread_over_the_instances_too():
    assert pages_by_instance(spread(prefill(8, 1), 16), 4, 16).tolist() == [2, 2, 2, 2]


def test_packing_fills_one_instance_after_the_other():
    shape = ClusterShape(num_instances=4, num_pages=10, page_size=16)
    # Requests of 7 pages, the last of them with 4 tokens: the second has 3 on the first instance and 4 on the next.
    first, second, third = packed(prefill(3, 100, scales_down=True), shape)
    assert [(i.instance, i.begin, i.end) for i in first] == [(0, 0, 100)]
    assert [(i.instance, i.begin, i.end) for i in second] == [(0, 0, 48), (1, 48, 100)]
    assert [(i.instance, i.begin, i.end) for i in third] == [(1, 0, 96), (2, 96, 100)]


def test_masters_take_rows_as_evenly_as_they_can():
    assert masters_of(decode(7, 10, 4, 3)) == [0, 1, 2, 0, 1, 2, 0]


def test_what_fits_is_not_refused():
    assert refusal(prefill(4, 1000)) is None
    assert refusal(decode(4, 400, 2, 2)) is None


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (prefill(1, 100, sp=5), "needs more devices"),
        (Case(kind="prefill", strategy=Strategy(1, 2), input_len=5), "needs more devices"),
        (prefill(1, 10_001), "longer than the model's context"),
        (prefill(65, 1), "--max-num-seqs"),
        (decode(65, 1, 1, 1), "--max-num-seqs"),
        (prefill(1, 4097, sp=1), "--max-num-batched-tokens"),
        (prefill(1, 4 * 1024 + 1), "does not fit into the KV pool"),
        (prefill(1, 4 * 1024 + 1, scales_down=True), "does not fit into the KV pool"),
        (decode(1, 1024, 1, 1), "does not fit into the KV pool"),
        (Case(kind="migration", strategy=Strategy(2), input_len=1025), "does not fit into the KV pool"),
        (extend(500, 525), "does not fit into the KV pool"),
        (extend(17, 496, num_decodes=1), "does not fit into the KV pool"),
        (extend(5000, 5001), "longer than the model's context"),
        (extend(2, 2, num_decodes=64), "--max-num-seqs"),
        (extend(4097, 2), "--max-num-batched-tokens"),
        (extend(4090, 2, num_decodes=7), "--max-num-batched-tokens"),
    ],
    ids=str,
)
def test_what_does_not_fit_says_why(case, reason):
    found = refusal(case)
    assert found is not None
    assert reason in found


def test_an_extend_may_fill_the_pool_to_its_last_page():
    assert refusal(extend(500, 524)) is None
    # 512 tokens with the chunk, and 497 with the decode's.
    assert refusal(extend(16, 496, num_decodes=1)) is None


def test_more_masters_may_have_more_rows_between_them():
    assert refusal(decode(20, 1, 2, 1), max_num_seqs=10) is not None
    assert refusal(decode(20, 1, 2, 2), max_num_seqs=10) is None


def test_a_prefill_may_fill_the_pool_to_its_last_page():
    assert refusal(prefill(1, 4 * 1024)) is None
    assert refusal(prefill(4, 1024)) is None
    assert refusal(prefill(4, 1024, scales_down=True)) is None
