"""The striped layout: where tokens lie, and what a row sees of each rank's keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.parallel import PADDING_ROW, stripe, stripe_row_starts, unstripe
from loongjax.parallel.striped import local_length, visible_ranges

RANKS = st.integers(1, 8)
SEQ_LENS = st.lists(st.integers(1, 9), max_size=6)


@given(num_tokens=st.integers(0, 40), num_ranks=RANKS, slack=st.integers(0, 3))
def test_token_i_is_on_rank_i_mod_n_at_i_div_n(num_tokens, num_ranks, slack):
    rows = local_length(num_tokens, num_ranks) + slack
    striped = stripe(np.arange(num_tokens), num_ranks, fill=-1, rows=rows)
    assert striped.shape == (num_ranks, rows)
    for token in range(num_tokens):
        assert striped[token % num_ranks, token // num_ranks] == token
    assert (striped == -1).sum() == num_ranks * rows - num_tokens


@given(num_tokens=st.integers(0, 40), num_ranks=RANKS)
def test_unstripe_undoes_stripe(num_tokens, num_ranks):
    tokens = np.random.default_rng(0).standard_normal((num_tokens, 2, 3))
    np.testing.assert_array_equal(unstripe(stripe(tokens, num_ranks, fill=0), num_tokens), tokens)


def test_the_fewest_rows_that_hold_all_tokens_is_the_default():
    assert stripe(np.arange(7), 3, fill=0).shape == (3, 3)
    assert stripe(np.arange(6), 3, fill=0).shape == (3, 2)


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="7 tokens do not fit 3 ranks of 2 rows"):
        stripe(np.arange(7), 3, fill=0, rows=2)


def test_row_starts_are_the_packed_index_of_each_requests_first_token():
    np.testing.assert_array_equal(stripe_row_starts([2, 1, 3], 4), [[0, 3], [0, 3], [2, PADDING_ROW], [3, PADDING_ROW]])


@functools.partial(jax.jit, static_argnums=1)
def ranges_of_all_pairs(row_starts: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """k_start and k_end, [rank, source_rank, row]."""
    ranks = jnp.arange(n, dtype=jnp.int32)

    def one_pair(row_starts: jax.Array, rank: jax.Array, source_rank: jax.Array) -> tuple[jax.Array, jax.Array]:
        return visible_ranges(row_starts, rank, source_rank, n)

    return jax.vmap(jax.vmap(one_pair, (None, None, 0)), (0, 0, None))(row_starts, ranks, ranks)


@settings(deadline=None, max_examples=60)
@given(seq_lens=SEQ_LENS, num_ranks=RANKS)
def test_a_row_sees_its_own_requests_tokens_up_to_itself(seq_lens, num_ranks):
    num_tokens = sum(seq_lens)
    rows = local_length(6 * 9, num_ranks) + 1
    row_starts = stripe_row_starts(seq_lens, num_ranks, rows=rows)
    first_token = np.repeat(np.cumsum(seq_lens) - seq_lens, seq_lens)
    k_start, k_end = map(np.asarray, ranges_of_all_pairs(jnp.asarray(row_starts), num_ranks))
    for rank, source_rank, row in np.ndindex(k_start.shape):
        own = row * num_ranks + rank
        seen = (
            np.arange(int(k_start[rank, source_rank, row]), int(k_end[rank, source_rank, row])) * num_ranks
            + source_rank
        )
        wanted = np.arange(int(first_token[own]), own + 1) if own < num_tokens else np.arange(0)
        np.testing.assert_array_equal(seen, wanted[wanted % num_ranks == source_rank])


@pytest.mark.parametrize("row_start", [int(PADDING_ROW), 8, 7])
def test_a_row_that_starts_after_itself_sees_nothing(row_start):
    starts = jnp.full(2, row_start, jnp.int32)
    for rank in range(3):
        for source_rank in range(3):
            k_start, k_end = visible_ranges(starts, rank, source_rank, 3)
            assert (np.asarray(k_end) <= np.asarray(k_start)).all()
