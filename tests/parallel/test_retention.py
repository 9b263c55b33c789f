"""KV retention: what the ring leaves in each instance's pool."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from loongjax.parallel import retain, ring_attention, stripe, stripe_row_starts, unstripe
from tests.pallas_kernels.brute_force import attend_sequences
from tests.pallas_kernels.tolerance import assert_matches
from tests.parallel.meshes import AXIS, mesh_of

N, K, H = 4, 2, 8
L, PAGES, PAGE_SIZE = 2, 6, 4
ROWS = 5


def prefill(n: int):
    """Jitted and donating its pool: ring attention in layer 1 that retains on the way."""

    def body(pool, q, k, v, row_starts, kept_slots):
        pool, q, k, v, row_starts, kept_slots = (x[0] for x in (pool, q, k, v, row_starts, kept_slots))

        def visit(source_rank, k, v, pool):
            return retain(pool, jnp.int32(1), kept_slots, source_rank, k, v)

        o, lse, pool = ring_attention(q, k, v, row_starts, axis_name=AXIS, visit=visit, carry=pool)
        return o[None], lse[None], pool[None]

    return jax.jit(jax.shard_map(body, mesh=mesh_of(n), in_specs=P(AXIS), out_specs=P(AXIS)), donate_argnums=0)


def random_placement(rng: np.random.Generator, num_tokens: int, n: int) -> np.ndarray:
    """int32 [n, num_tokens]: each token is kept in a random slot by one instance, two, or none; -1 elsewhere."""
    slots = np.full((n, num_tokens), -1, np.int32)
    for instance in range(n):
        free = rng.permutation(PAGES * PAGE_SIZE).astype(np.int32)[:num_tokens]
        kept = rng.random(len(free)) < 1.5 / n
        slots[instance, : len(free)][kept] = free[kept]
    return slots


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_exactly_the_kept_tokens_are_in_exactly_their_slots(n):
    rng = np.random.default_rng(n)
    seq_lens = [2 * n, 1, n]
    num_tokens = sum(seq_lens)
    q, k, v = (rng.standard_normal((num_tokens, heads, H)).astype(np.float32) for heads in (N, K, K))
    placement = random_placement(rng, num_tokens, n)
    pool = rng.standard_normal((n, L, 2, PAGES, PAGE_SIZE, K, H)).astype(np.float32)
    expected = pool.copy()
    for instance in range(n):
        for token in np.flatnonzero(placement[instance] >= 0):
            page, offset = divmod(int(placement[instance, token]), PAGE_SIZE)
            expected[instance, 1, :, page, offset] = k[token], v[token]

    kept_slots = np.stack([stripe(slots, n, fill=-1, rows=ROWS) for slots in placement])
    striped = [stripe(x, n, fill=np.nan, rows=ROWS) for x in (q, k, v)]
    o, lse, pool = prefill(n)(jnp.asarray(pool), *striped, stripe_row_starts(seq_lens, n, rows=ROWS), kept_slots)
    np.testing.assert_array_equal(pool, expected)
    outputs = [unstripe(np.asarray(x), num_tokens) for x in (o, lse)]
    assert_matches(outputs, attend_sequences(q, k, v, seq_lens))


@pytest.mark.parametrize("n", [1, 3])
def test_the_pool_goes_round_the_ring_without_a_copy(n):
    pages = 512
    shapes = [
        ((n, L, 2, pages, 16, K, 64), jnp.float32),
        *[((n, ROWS, heads, 64), jnp.float32) for heads in (N, K, K)],
        ((n, ROWS), jnp.int32),
        ((n, n, ROWS), jnp.int32),
    ]
    compiled = prefill(n).lower(*[jax.ShapeDtypeStruct(*x) for x in shapes]).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    pool_bytes = L * 2 * pages * 16 * K * 64 * 4
    assert memory.alias_size_in_bytes == pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 8


def test_a_donated_pool_keeps_its_buffers():
    n = 3
    run = prefill(n)
    sharding = jax.sharding.NamedSharding(mesh_of(n), P(AXIS))
    pool = jnp.zeros((n, L, 2, PAGES, PAGE_SIZE, K, H), device=sharding)
    pointers = [shard.data.unsafe_buffer_pointer() for shard in pool.addressable_shards]
    tokens = [np.ones((n, ROWS, heads, H), np.float32) for heads in (N, K, K)]
    row_starts = stripe_row_starts([n * ROWS], n)
    kept_slots = np.full((n, n, ROWS), -1, np.int32)
    for _ in range(2):
        _, _, pool = run(pool, *tokens, row_starts, kept_slots)
        assert [shard.data.unsafe_buffer_pointer() for shard in pool.addressable_shards] == pointers
