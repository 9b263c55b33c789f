"""The radix search keeps exactly what a sort and a cumulative sum would."""

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from loongjax.runtime.sampling.filters import filter_logits
from loongjax.runtime.sampling.rows import UNLIMITED
from tests.runtime.sampling.oracle import kept

filter_jit = jax.jit(filter_logits)
ROUNDING = 1e-5


def keep_mask(logits, top_k: Any = 0, top_p: Any = 1.0, min_p: Any = 0.0) -> np.ndarray:
    """Filters rows [B, V] shifted to a maximum of 0; scalars go to every row. Few shapes are compiled."""
    rows = np.atleast_2d(np.asarray(logits, np.float32))
    num_rows, vocab_size = rows.shape
    shape = (max(num_rows, 6), max(vocab_size, 50))
    padded = np.full(shape, -np.inf, np.float32)
    padded[:num_rows, :vocab_size] = rows
    columns = [np.zeros(shape[0], dtype) for dtype in (np.int32, np.float32, np.float32)]
    for column, value in zip(columns, (top_k, top_p, min_p), strict=True):
        column[:num_rows] = value
    columns[0][columns[0] == 0] = UNLIMITED
    filtered = np.asarray(filter_jit(padded, *columns))[:num_rows, :vocab_size]
    mask = filtered > -np.inf
    np.testing.assert_array_equal(filtered[mask], rows[mask])
    return mask


def shifted(logits) -> np.ndarray:
    return logits - logits.max(axis=-1, keepdims=True)


coarse_rows = hnp.arrays(np.int8, (6, 19), elements=st.integers(-12, 12)).map(
    lambda grid: shifted(grid.astype(np.float32) / 2)
)
fine_rows = st.integers(0, 2**32 - 1).map(
    lambda seed: shifted(np.random.default_rng(seed).normal(scale=3, size=(6, 19)).astype(np.float32))
)
banned = hnp.arrays(np.bool_, (6, 19))


def columns_of(elements):
    return st.lists(elements, min_size=6, max_size=6)


@settings(deadline=None, max_examples=150)
@given(
    rows=coarse_rows | fine_rows,
    banned=banned,
    top_k=columns_of(st.integers(0, 25)),
    top_p=columns_of(st.just(1.0) | st.floats(0.001, 0.999)),
    min_p=columns_of(st.just(0.0) | st.floats(0.0, 1.0)),
)
def test_filters_keep_what_a_sort_keeps(rows, banned, top_k, top_p, min_p):
    rows = np.where(banned & (rows < 0), -np.inf, rows).astype(np.float32)
    mask = keep_mask(rows, top_k, top_p, min_p)
    for row in range(6):
        p, m, finite = top_p[row], min_p[row], rows[row] > -np.inf
        low_p, high_p = (1.0, 1.0) if p == 1.0 else (p - ROUNDING, min(p + ROUNDING, 1 - 1e-9))
        least = kept(rows[row], top_k[row], low_p, min(m * (1 + ROUNDING), 1.0)) & finite
        most = kept(rows[row], top_k[row], high_p, m * (1 - ROUNDING)) & finite
        assert (least <= mask[row]).all()
        assert (mask[row] <= most).all()
        assert mask[row].any()


def test_disabled_filters_keep_every_token_exactly():
    rows = shifted(np.random.default_rng(0).normal(scale=30, size=(6, 50)).astype(np.float32))
    assert keep_mask(rows).all()


def test_a_top_k_of_the_whole_vocabulary_or_more_keeps_every_token():
    rows = shifted(np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32))
    assert keep_mask(rows, top_k=50).all()
    assert keep_mask(rows, top_k=1000).all()


@pytest.mark.parametrize("num_kept", [1, 2, 3, 7, 8])
def test_equal_logits_are_kept_by_lowest_id(num_kept):
    expected = np.arange(8) < num_kept
    np.testing.assert_array_equal(keep_mask(np.zeros(8), top_k=num_kept)[0], expected)
    np.testing.assert_array_equal(keep_mask(np.zeros(8), top_p=num_kept / 8 - 0.01)[0], expected)


def test_top_p_is_measured_on_what_top_k_kept():
    row = shifted(np.log([0.4, 0.3, 0.2, 0.1]))
    np.testing.assert_array_equal(keep_mask(row, top_k=2, top_p=0.5)[0], [True, False, False, False])
    np.testing.assert_array_equal(keep_mask(row, top_p=0.5)[0], [True, True, False, False])


def test_top_p_reached_exactly_keeps_no_further_token():
    assert keep_mask(np.zeros(8), top_p=0.5)[0].sum() == 4


def test_min_p_one_keeps_all_tokens_that_equal_the_first():
    np.testing.assert_array_equal(keep_mask([0.0, -0.001, 0.0, -5.0], min_p=1.0)[0], [True, False, True, False])


def test_the_first_token_survives_the_smallest_top_p():
    row = shifted(np.random.default_rng(1).normal(size=50))
    mask = keep_mask(row, top_p=1e-30)[0]
    np.testing.assert_array_equal(np.flatnonzero(mask), [row.argmax()])


def test_banned_tokens_never_come_back():
    row = np.full(19, -np.inf)
    row[11] = 0.0
    for params in ({}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}):
        np.testing.assert_array_equal(np.flatnonzero(keep_mask(row, **params)[0]), [11])


def test_a_row_of_nan_leaves_the_other_rows_alone():
    rows = np.stack([np.zeros(8), np.full(8, np.nan)]).astype(np.float32)
    np.testing.assert_array_equal(keep_mask(rows, top_k=3)[0], np.arange(8) < 3)


def test_a_large_vocabulary_is_cut_where_a_sort_cuts_it():
    rows = shifted(np.random.default_rng(2).normal(scale=2, size=(6, 32001)).astype(np.float32))
    top_k, top_p = [0, 4000, 50, 30000, 32000, 0], [0.9, 0.8, 1.0, 0.999, 1.0, 0.1]
    mask = keep_mask(rows, top_k, top_p)
    for row in range(6):
        expected = kept(rows[row], top_k[row], top_p[row], 0.0)
        # A sum of 32001 float32 terms is off by some 1e-5 of the whole: a few of the least probable tokens.
        assert abs(int(mask[row].sum()) - int(expected.sum())) <= (0 if top_p[row] == 1.0 else 20)
        assert mask[row][rows[row] > rows[row][expected].min() + 0.05].all()
