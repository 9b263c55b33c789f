"""Variants over the paged pool on a GPU against loops in float64, over pools poisoned wherever no table points."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loongjax.pallas_kernels import decode_attention, extend_attention, kv_update
from tests.pallas_kernels.brute_force import attend_requests, attend_row
from tests.pallas_kernels.paged_case import make_case, random_queries
from tests.pallas_kernels.tolerance import assert_matches

pytestmark = pytest.mark.gpu

HEADS = [(32, 8, 128), (8, 8, 128), (8, 1, 64), (12, 4, 32), (64, 1, 128), (4, 2, 256)]
LENGTHS = {
    "block edges": [0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257],
    "one row": [3001],
    "one token": [1],
    "a long row among short ones": [7, 9001, 0, 3, 3, 1, 0, 500],
    "many rows": [(37 * i) % 700 for i in range(300)],
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_decode_attention_is_float64s(lengths, page_size, dtype):
    for seed, (num_q_heads, num_kv_heads, head_dim) in enumerate(HEADS):
        if lengths == "many rows" and seed > 1:
            continue  # the pools are large
        kv_lens = LENGTHS[lengths]
        case = make_case(seed, kv_lens, page_size=page_size, heads=(num_kv_heads, head_dim), dtype=dtype)
        q = random_queries(seed, len(kv_lens), num_q_heads, head_dim, dtype)
        rows = [attend_row(*row) for row in zip(np.asarray(q), case.keys, case.values, strict=True)]
        exact = np.array([o for o, _ in rows]), np.array([lse for _, lse in rows])
        found = decode_attention(q, *case.arguments, implementation="triton", out_dtype=jnp.float32)
        assert_matches(found, exact, dtype)
        again = decode_attention(q, *case.arguments, implementation="triton", out_dtype=jnp.float32)
        for first, second in zip(found, again, strict=True):
            np.testing.assert_array_equal(first, second)


EXTENSIONS = {
    "a mix": ([70, 1, 0, 29, 200], [300, 17, 40, 0, 1025]),
    "one long request": ([512], [9000]),
    "few rows over many keys": ([40], [30_001]),
    "around what Hopper's kernel takes in a batch": ([31, 1, 32, 33, 0, 1], [300, 1025, 17, 640, 9, 2000]),
    "many short ones": ([3] * 60, [(37 * i) % 500 for i in range(60)]),
}


@pytest.mark.parametrize(
    ("implementation", "page_size"),
    [
        ("triton", 1),
        ("triton", 16),
        ("by_length", 1),
        ("by_length", 16),
        *(("mosaic_gpu", page_size) for page_size in (1, 4, 8, 16, 64, 256)),
    ],
)
@pytest.mark.parametrize("lengths", EXTENSIONS)
def test_extend_attention_is_float64s(lengths, implementation, page_size):
    if implementation != "triton" and getattr(jax.devices()[0], "compute_capability", "") != "9.0":
        pytest.skip("needs a Hopper GPU")
    q_lens, kv_lens = EXTENSIONS[lengths]
    for seed, (num_q_heads, num_kv_heads, head_dim) in enumerate(HEADS[: 4 if implementation == "triton" else 3]):
        case = make_case(seed, kv_lens, page_size=page_size, heads=(num_kv_heads, head_dim), dtype="bfloat16")
        q = random_queries(seed, sum(q_lens) + 5, num_q_heads, head_dim, "bfloat16")
        truth = attend_requests(np.asarray(q), q_lens, case.keys, case.values)
        operands = (q, jnp.asarray(np.cumsum([0, *q_lens]), jnp.int32), *case.arguments)
        extend = functools.partial(extend_attention, implementation=implementation, out_dtype=jnp.float32)
        found = extend(*operands)
        assert_matches(found, truth, "bfloat16")
        for first, second in zip(found, extend(*operands), strict=True):
            np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("num_tokens", [1, 5, 1000])
@pytest.mark.parametrize("heads", [(8, 128), (3, 64), (1, 32)])
def test_kv_update_is_the_references_and_in_place(num_tokens, heads):
    rng = np.random.default_rng(num_tokens)
    pool = jax.random.normal(jax.random.key(0), (3, 2, 100, 16, *heads), jnp.bfloat16)
    k, v = jax.random.normal(jax.random.key(1), (2, num_tokens, *heads), jnp.float32)
    slots = np.asarray(rng.permutation(1600)[:num_tokens], np.int32)
    slots[::3] = rng.choice(np.array([-1, 1600, np.iinfo(np.int32).max, np.iinfo(np.int32).min]), len(slots[::3]))
    expected = kv_update(pool, k, v, jnp.int32(1), jnp.asarray(slots), implementation="reference")
    update = jax.jit(lambda *operands: kv_update(*operands, implementation="triton"), donate_argnums=0)
    address = pool.unsafe_buffer_pointer()
    found = update(pool, k, v, jnp.int32(1), jnp.asarray(slots))
    assert found.unsafe_buffer_pointer() == address
    np.testing.assert_array_equal(found.view(jnp.uint16), expected.view(jnp.uint16))
