"""prefill_attention: both variants against loops in float64, and what each promises."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from loongjax.errors import ConfigError
from loongjax.pallas_kernels import prefill_attention
from loongjax.pallas_kernels.prefill_attention import blockwise
from tests.pallas_kernels.brute_force import attend_ranges
from tests.pallas_kernels.tolerance import assert_matches

SMALL_BLOCKS = functools.partial(
    blockwise.blockwise_prefill_attention,
    sm_scale=16**-0.5,
    out_dtype=jnp.dtype("float32"),
    block_sizes=blockwise.BlockSizes(block_q=4, block_k=8),
)
VARIANTS: dict[str, Callable] = {
    "reference": functools.partial(prefill_attention, implementation="reference"),
    "blockwise": functools.partial(prefill_attention, implementation="blockwise"),
    "small blocks": SMALL_BLOCKS,
}
T, S, N, K, H = 13, 29, 4, 2, 16
BOUNDS = st.integers(-3, S + 3)


def random_inputs(seed: int, shape: tuple[int, int, int, int, int] = (T, S, N, K, H), dtype: str = "float32"):
    """q, k, v of the shape (T, S, N, K, H)."""
    rng = np.random.default_rng(seed)
    T, S, N, K, H = shape
    return [np.array(jnp.asarray(rng.standard_normal(x), dtype)) for x in ((T, N, H), (S, K, H), (S, K, H))]


def on_device(*arrays: np.ndarray) -> list[jax.Array]:
    return [jnp.asarray(x) for x in arrays]


def causal(num_rows: int, num_keys: int) -> tuple[np.ndarray, np.ndarray]:
    """The last `num_rows` tokens of a sequence of `num_keys`."""
    own = np.arange(num_rows, dtype=np.int32) + num_keys - num_rows
    return np.zeros(num_rows, np.int32), own + 1


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=20, deadline=None)
@given(ranges=st.lists(st.tuples(BOUNDS, BOUNDS), min_size=T, max_size=T), seed=st.integers(0, 99))
def test_every_row_attends_to_its_own_range(variant, ranges, seed):
    q, k, v = random_inputs(seed)
    k_start, k_end = np.array(ranges, np.int32).T
    actual = VARIANTS[variant](*on_device(q, k, v, k_start, k_end))
    assert_matches(actual, attend_ranges(q, k, v, k_start, k_end))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param((40, 40, 4, 4, 64), "float32", id="MHA"),
        pytest.param((33, 300, 8, 2, 128), "float32", id="GQA, two key blocks"),
        pytest.param((33, 300, 8, 2, 128), "bfloat16", id="GQA, bfloat16"),
        pytest.param((40, 40, 4, 4, 64), "float16", id="MHA, float16"),
        pytest.param((150, 150, 4, 1, 16), "bfloat16", id="MQA, two query blocks, bfloat16"),
        pytest.param((1, 1, 2, 1, 16), "float32", id="one token"),
    ],
)
def test_shapes_and_dtypes_agree_with_float64(shape, dtype):
    q, k, v = random_inputs(1, shape, dtype)
    ranges = causal(shape[0], shape[1])
    expected = attend_ranges(q, k, v, *ranges)
    for implementation in ("reference", "blockwise"):
        o, lse = prefill_attention(*on_device(q, k, v, *ranges), implementation=implementation)
        assert o.dtype == dtype
        assert_matches((o, lse), expected, dtype)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize(("num_rows", "num_keys"), [(0, 5), (5, 0), (0, 0)])
def test_no_rows_or_no_keys_at_all(num_rows, num_keys, implementation):
    q, k, v = random_inputs(0, (num_rows, num_keys, N, K, H))
    k_start, k_end = np.zeros(num_rows, np.int32), np.full(num_rows, 3, np.int32)
    o, lse = prefill_attention(*on_device(q, k, v, k_start, k_end), implementation=implementation)
    np.testing.assert_array_equal(o, np.zeros((num_rows, N, H)))
    np.testing.assert_array_equal(lse, np.full((num_rows, N), -np.inf))


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_without_keys_give_exactly_zero_and_minus_infinity(variant):
    q, k, v = random_inputs(0)
    k_start = np.full(T, 5, np.int32)
    k_end = np.where(np.arange(T) % 2, 9, np.arange(T) - 7).astype(np.int32)
    o, lse = VARIANTS[variant](*on_device(q, k, v, k_start, k_end))
    empty = k_end <= k_start
    assert (np.asarray(o)[empty] == 0).all()
    assert (np.asarray(lse)[empty] == -np.inf).all()
    assert np.isfinite(np.asarray(lse)[~empty]).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_in_keys_that_no_row_sees_is_harmless(variant):
    q, k, v = random_inputs(3)
    k_start, k_end = np.full(T, 10, np.int32), np.full(T, 19, np.int32)
    expected = attend_ranges(q, k, v, k_start, k_end)
    for x in (k, v):
        x[:10] = np.nan
        x[19:] = np.nan
    assert_matches(VARIANTS[variant](*on_device(q, k, v, k_start, k_end)), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_large_junk_in_keys_that_a_row_does_not_see_is_harmless(variant):
    q, k, v = random_inputs(4)
    k_start, k_end = causal(T, T)
    k_end[-1] = S
    expected = attend_ranges(q, k, v, k_start, k_end)
    for x in (k, v):
        x[T:] = 1e30
    o, lse = VARIANTS[variant](*on_device(q, k, v, k_start, k_end))
    assert_matches((o[:-1], lse[:-1]), (expected[0][:-1], expected[1][:-1]))


def test_two_runs_give_the_same_bits():
    arrays = on_device(*random_inputs(5), *causal(T, S))
    for first, second in zip(SMALL_BLOCKS(*arrays), SMALL_BLOCKS(*arrays), strict=True):
        np.testing.assert_array_equal(first, second)


def test_the_scale_and_the_output_dtype_are_the_callers():
    q, k, v = random_inputs(6, dtype="bfloat16")
    ranges = causal(T, S)
    for implementation in ("reference", "blockwise"):
        o, lse = prefill_attention(
            *on_device(q, k, v, *ranges), sm_scale=0.5, out_dtype=jnp.float32, implementation=implementation
        )
        assert o.dtype == lse.dtype == jnp.float32
        assert_matches((o, lse), attend_ranges(q, k, v, *ranges, sm_scale=0.5), "bfloat16")


def test_only_key_blocks_that_some_row_sees_are_visited(monkeypatch):
    visits = []

    def counting_absorb(state, scores, values):
        jax.debug.callback(lambda: visits.append(scores.shape))
        return original(state, scores, values)

    original = blockwise.absorb
    monkeypatch.setattr(blockwise, "absorb", counting_absorb)
    q, k, v = random_inputs(7, (8, 64, 2, 1, 16))
    # Two query blocks of 4 rows; key blocks of 8. The first sees blocks 0 and 7 but none between, the second block 3.
    k_start = np.array([0, 60, 0, 60, 24, 26, 9, 24], np.int32)
    k_end = np.array([5, 64, 8, 61, 30, 32, 9, 25], np.int32)
    o, lse = blockwise.blockwise_prefill_attention(
        *on_device(q, k, v, k_start, k_end),
        sm_scale=0.25,
        out_dtype=jnp.dtype("float32"),
        block_sizes=blockwise.BlockSizes(block_q=4, block_k=8),
    )
    jax.effects_barrier()
    assert len(visits) == 3
    assert_matches((o, lse), attend_ranges(q, k, v, k_start, k_end))


def test_the_score_matrix_never_exists():
    T = S = 8192
    q, kv = jax.ShapeDtypeStruct((T, 8, 64), jnp.float32), jax.ShapeDtypeStruct((S, 2, 64), jnp.float32)
    bounds = jax.ShapeDtypeStruct((T,), jnp.int32)
    compiled = jax.jit(prefill_attention).lower(q, kv, kv, bounds, bounds).compile()
    one_head_of_scores = T * S * 4
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < one_head_of_scores / 2


def loss(attend: Callable, weights: tuple[jax.Array, jax.Array], q, k, v, k_start, k_end) -> jax.Array:
    """Any function of both outputs; rows without keys have no finite log-sum-exp to count."""
    o, lse = attend(q, k, v, k_start, k_end)
    return (weights[0] * jnp.sin(o)).sum() + (weights[1] * jnp.where(lse == -jnp.inf, 0.0, lse)).sum()


@functools.partial(jax.jit, static_argnums=0)
def gradients(variant: str, q, k, v, k_start, k_end) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(8))
    weights = jax.random.normal(keys[0], (T, N, H)), jax.random.normal(keys[1], (T, N))
    grad = jax.grad(functools.partial(loss, VARIANTS[variant], weights), argnums=(0, 1, 2))
    return grad(q, k, v, k_start, k_end)


@settings(max_examples=10, deadline=None)
@given(ranges=st.lists(st.tuples(BOUNDS, BOUNDS), min_size=T, max_size=T), seed=st.integers(0, 99))
def test_gradients_of_blockwise_are_those_of_the_reference(ranges, seed):
    arrays = on_device(*random_inputs(seed), *np.array(ranges, np.int32).T)
    for actual, expected in zip(gradients("small blocks", *arrays), gradients("reference", *arrays), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_the_reference_are_those_of_finite_differences():
    arrays = on_device(*random_inputs(9), *causal(T, S))
    weights = jnp.ones((T, N, H)), jnp.ones((T, N))

    def attend(q, k, v):
        return loss(VARIANTS["reference"], weights, q, k, v, *arrays[3:])

    check_grads(jax.jit(attend), arrays[:3], order=1, modes=["rev"], eps=1e-2, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("variant", ["reference", "small blocks"])
def test_nan_in_keys_that_no_row_sees_has_no_gradient(variant):
    q, k, v = random_inputs(10)
    k[10:], v[10:] = np.nan, np.nan
    k_end = np.where(np.arange(T) == 3, 0, 10).astype(np.int32)
    dq, dk, dv = map(np.asarray, gradients(variant, *on_device(q, k, v, np.zeros(T, np.int32), k_end)))
    assert np.isfinite(dq).all()
    assert (dq[3] == 0).all()
    for gradient in (dk, dv):
        assert np.isfinite(gradient[:10]).all()
        assert (gradient[10:] == 0).all()


@pytest.mark.parametrize("check_vma", [True, False])
def test_sharded_queries_against_replicated_keys_inside_shard_map(check_vma):
    mesh = Mesh(np.array(jax.devices())[[1, 4, 6]], ("rows",))
    q, k, v = random_inputs(11, (12, S, N, K, H))
    ranges = causal(12, S)
    attend = jax.shard_map(
        prefill_attention,
        mesh=mesh,
        in_specs=(P("rows"), P(), P(), P("rows"), P("rows")),
        out_specs=P("rows"),
        check_vma=check_vma,
    )
    assert_matches(jax.jit(attend)(q, k, v, *ranges), attend_ranges(q, k, v, *ranges))


def test_the_gradient_of_replicated_keys_sums_over_the_mesh():
    mesh = Mesh(np.array(jax.devices())[[1, 4, 6]], ("rows",))
    arrays = on_device(*random_inputs(12, (12, S, N, K, H)), *causal(12, S))
    sharded = jax.shard_map(
        prefill_attention, mesh=mesh, in_specs=(P("rows"), P(), P(), P("rows"), P("rows")), out_specs=P("rows")
    )

    def dk(attend: Callable) -> jax.Array:
        return jax.jit(jax.grad(lambda k: (attend(arrays[0], k, *arrays[2:])[0] ** 2).sum()))(arrays[1])

    np.testing.assert_allclose(dk(sharded), dk(prefill_attention), rtol=1e-4, atol=1e-4)


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="one of blockwise, mosaic_gpu, reference, triton, got 'flash'"):
        prefill_attention(*on_device(*random_inputs(0), *causal(T, S)), implementation="flash")


@pytest.mark.parametrize(
    ("q_shape", "kv_shape", "message"),
    [((T, 3, H), (S, 2, H), "got 3 and 2"), ((T, 2, H), (S, 4, H), "got 2 and 4")],
)
def test_heads_that_do_not_group_are_refused(q_shape, kv_shape, message):
    q, kv = jnp.zeros(q_shape), jnp.zeros(kv_shape)
    with pytest.raises(ValueError, match=message):
        prefill_attention(q, kv, kv, *on_device(*causal(T, S)))


def test_mixed_dtypes_are_refused():
    q, k, v = on_device(*random_inputs(0))
    with pytest.raises(ValueError, match="one dtype, got float32, bfloat16, bfloat16"):
        prefill_attention(q, k.astype("bfloat16"), v.astype("bfloat16"), *on_device(*causal(T, S)))


def test_block_sizes_are_positive():
    with pytest.raises(ConfigError, match=r"self\.block_k=0"):
        blockwise.BlockSizes(block_k=0)
