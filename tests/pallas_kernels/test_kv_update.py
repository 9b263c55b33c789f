"""kv_update writes exactly the slots it is given, in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.pallas_kernels import kv_update

POOL_SHAPE = (3, 2, 5, 4, 2, 8)
NUM_SLOTS = 20
T = 6


def random_pool(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(POOL_SHAPE).astype(np.float32)


def random_keys(seed: int, num_tokens: int = T) -> tuple[np.ndarray, np.ndarray]:
    k, v = np.random.default_rng(seed).standard_normal((2, num_tokens, 2, 8)).astype(np.float32)
    return k, v


@settings(max_examples=30, deadline=None)
@given(
    slots=st.lists(st.integers(-3, NUM_SLOTS + 3), min_size=T, max_size=T, unique=True),
    layer=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_named_slots_of_one_layer_change_and_nothing_else(slots, layer, seed):
    pool, (k, v) = random_pool(), random_keys(seed)
    expected = pool.copy()
    for token, slot in enumerate(slots):
        if 0 <= slot < NUM_SLOTS:
            expected[layer, 0, slot // 4, slot % 4] = k[token]
            expected[layer, 1, slot // 4, slot % 4] = v[token]
    arguments = (jnp.asarray(x) for x in (pool, k, v, np.int32(layer), np.array(slots, np.int32)))
    np.testing.assert_array_equal(kv_update(*arguments), expected)


def test_several_dropped_tokens_leave_the_pool_as_it_is():
    pool, (k, v) = random_pool(), random_keys(1)
    slots = jnp.full(T, -1, jnp.int32)
    np.testing.assert_array_equal(
        kv_update(jnp.asarray(pool), jnp.asarray(k), jnp.asarray(v), jnp.int32(2), slots), pool
    )


def test_keys_are_rounded_to_the_dtype_of_the_pool():
    k, v = map(jnp.asarray, random_keys(2, 1))
    pool = kv_update(jnp.zeros(POOL_SHAPE, jnp.bfloat16), k, v, jnp.int32(0), jnp.array([7], jnp.int32))
    assert pool.dtype == jnp.bfloat16
    np.testing.assert_array_equal(pool[0, 0, 1, 3], k[0].astype(jnp.bfloat16))


def test_a_donated_pool_keeps_its_buffer():
    update = jax.jit(kv_update, donate_argnums=0)
    pool = jnp.zeros(POOL_SHAPE)
    pointer = pool.unsafe_buffer_pointer()
    k, v = map(jnp.asarray, random_keys(3))
    for layer in range(3):
        pool = update(pool, k, v, jnp.int32(layer), jnp.arange(T, dtype=jnp.int32) * 3)
        assert pool.unsafe_buffer_pointer() == pointer
    np.testing.assert_array_equal(pool[2, 0, 0, 3], k[1])


@pytest.mark.parametrize("num_tokens", [1, 64])
def test_the_compiled_update_makes_no_copy_of_the_pool(num_tokens):
    pool = jax.ShapeDtypeStruct((4, 2, 1024, 16, 2, 64), jnp.float32)
    new = jax.ShapeDtypeStruct((num_tokens, 2, 64), jnp.float32)
    layer, slots = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((num_tokens,), jnp.int32)
    compiled = jax.jit(kv_update, donate_argnums=0).lower(pool, new, new, layer, slots).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == 4 * 2 * 1024 * 16 * 2 * 64 * 4
    assert memory.temp_size_in_bytes < 2**20


def test_a_variant_that_is_not_built_says_so():
    k, v = map(jnp.asarray, random_keys(0))
    with pytest.raises(NotImplementedError, match="kv_update has no variant 'mosaic_gpu' yet; it has reference"):
        kv_update(jnp.zeros(POOL_SHAPE), k, v, jnp.int32(0), jnp.zeros(T, jnp.int32), implementation="mosaic_gpu")
