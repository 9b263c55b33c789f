"""Merging partial attentions equals attention over all keys."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.pallas_kernels import merge_attention, merge_partials
from tests.pallas_kernels.brute_force import attend_row
from tests.pallas_kernels.tolerance import assert_matches

N, K, H = 4, 2, 8


def partials(seed: int, sizes: list[int]) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Attention of one row over parts of these sizes, stacked; and over all of them."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((N, H))
    keys, values = rng.standard_normal((2, sum(sizes), K, H)) * 3
    cuts = np.cumsum(sizes)[:-1]
    parts = [attend_row(q, k, v) for k, v in zip(np.split(keys, cuts), np.split(values, cuts), strict=True)]
    stacked = np.array([o for o, _ in parts], np.float32), np.array([lse for _, lse in parts], np.float32)
    return stacked, attend_row(q, keys, values)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), sizes=st.lists(st.integers(0, 5), min_size=3, max_size=3))
def test_merged_parts_equal_the_whole(seed, sizes):
    (o, lse), whole = partials(seed, sizes)
    assert_matches(merge_partials(jnp.asarray(o), jnp.asarray(lse)), whole)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), sizes=st.lists(st.integers(0, 5), min_size=2, max_size=2))
def test_two_merged_parts_equal_the_whole(seed, sizes):
    (o, lse), whole = partials(seed, sizes)
    assert_matches(merge_attention(*map(jnp.asarray, (o[0], lse[0], o[1], lse[1]))), whole)


def test_parts_without_keys_leave_the_other_as_it_is():
    o, lse = jnp.ones((3, H)), jnp.array([-1.5, 0.0, 900.0])
    nothing = jnp.zeros((3, H)), jnp.full(3, -jnp.inf)
    for merged in (merge_attention(o, lse, *nothing), merge_attention(*nothing, o, lse)):
        np.testing.assert_array_equal(merged[0], o)
        np.testing.assert_array_equal(merged[1], lse)


def test_nothing_merged_with_nothing_is_nothing():
    o, lse = merge_partials(jnp.zeros((4, 3, H)), jnp.full((4, 3), -jnp.inf))
    np.testing.assert_array_equal(o, np.zeros((3, H)))
    np.testing.assert_array_equal(lse, np.full(3, -np.inf))


def test_the_output_of_a_part_without_keys_does_not_matter():
    o, lse = merge_attention(jnp.full((1, H), jnp.nan), jnp.array([-jnp.inf]), jnp.ones((1, H)), jnp.array([2.0]))
    np.testing.assert_array_equal(o, np.ones((1, H)))
    np.testing.assert_array_equal(lse, [2.0])


def test_the_result_is_float32_whatever_comes_in():
    o, lse = merge_attention(*[jnp.ones(shape, jnp.bfloat16) for shape in ((2, H), (2,), (2, H), (2,))])
    assert o.dtype == lse.dtype == jnp.float32


def test_large_log_sum_exps_do_not_overflow():
    _, lse = merge_attention(jnp.ones((1, H)), jnp.array([5000.0]), jnp.ones((1, H)), jnp.array([5000.0]))
    np.testing.assert_allclose(lse, [5000 + np.log(2)], rtol=1e-6)


def test_gradients_are_finite_where_parts_have_no_keys():
    lse = jnp.array([[-jnp.inf, 0.3], [-jnp.inf, -jnp.inf]])

    def loss(o, lse):
        merged_o, merged_lse = merge_partials(o, lse)
        return merged_o.sum() + jnp.where(merged_lse == -jnp.inf, 0.0, merged_lse).sum()

    for gradient in jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.ones((2, 2, H)), lse):
        assert np.isfinite(gradient).all()
