"""Ring attention on all GPUs, in both variants for GPUs, against the float32 reference on one."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.collective_schedule import read_schedule
from loongjax.pallas_kernels import prefill_attention
from loongjax.parallel import retain, ring_attention
from loongjax.parallel.striped import stripe, stripe_row_starts, unstripe
from tests.pallas_kernels.tolerance import assert_matches

pytestmark = pytest.mark.gpu

N, K, H = 8, 2, 128
AXIS = "ring"
PAGE_SIZE = 16
PACKINGS = {"blocks": [4096], "odd": [1001, 1, 130, 7, 600], "short": [3]}


@pytest.fixture(autouse=True)
def two_gpus() -> Iterator[None]:
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    # The reference's float32 products must not be rounded to tf32.
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(params=sorted({2, len(jax.devices())} - {1}))
def mesh(request) -> Mesh:
    """Not in the order of the devices' ids."""
    return Mesh(np.array(jax.devices()[: request.param][::-1]), (AXIS,))


def is_hopper() -> bool:
    return getattr(jax.devices()[0], "compute_capability", "") == "9.0"


@functools.cache
def ring_over(mesh: Mesh, variant: str):
    """Jitted: pool and arrays [n, T, ...] to outputs, log-sum-exps and the pool, which it donates."""
    options = {"variant": variant, "implementation": "mosaic_gpu" if is_hopper() else None}

    def attend(pool, kept_slots, *arrays):
        def visit(source_rank, k, v, pool):
            return retain(pool, jnp.int32(1), kept_slots[0], source_rank, k, v)

        outputs = ring_attention(*(x[0] for x in arrays), axis_name=AXIS, visit=visit, carry=pool[0], **options)
        return tuple(x[None] for x in outputs)

    sharded = jax.shard_map(attend, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False)
    return jax.jit(sharded, donate_argnums=0)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("variant", ["ring", "all_gather"])
def test_outputs_are_those_of_the_reference_and_every_kept_key_is_in_its_slot(mesh, variant, packing):
    seq_lens, n = PACKINGS[packing], mesh.size
    num_tokens = sum(seq_lens)
    rows = -(-num_tokens // n) + 3
    rng = np.random.default_rng(0)
    q, k, v = (np.array(jnp.asarray(rng.standard_normal((num_tokens, x, H)), jnp.bfloat16)) for x in (N, K, K))
    # Every token is kept by the rank after its own, in a slot of its own.
    pages = -(-rows // PAGE_SIZE)
    kept_slots = np.full((n, n, rows), -1, np.int32)
    for source in range(n):
        kept_slots[(source + 1) % n, source] = rng.permutation(pages * PAGE_SIZE)[:rows]
    by_rank = NamedSharding(mesh, P(AXIS))
    pool = jnp.zeros((n, 2, 2, pages, PAGE_SIZE, K, H), jnp.bfloat16, device=by_rank)
    striped = [stripe(x, n, fill=0, rows=rows) for x in (q, k, v)]
    arrays = [jax.device_put(x, by_rank) for x in (kept_slots, *striped, stripe_row_starts(seq_lens, n, rows=rows))]

    starts = np.repeat(np.cumsum(seq_lens) - seq_lens, seq_lens).astype(np.int32)
    ends = np.arange(num_tokens, dtype=np.int32) + 1
    expected = prefill_attention(*(jnp.asarray(x) for x in (q, k, v, starts, ends)), implementation="reference")
    for _ in range(2):
        o, lse, pool = ring_over(mesh, variant)(pool, *arrays)
        assert_matches([unstripe(np.asarray(x), num_tokens) for x in (o, lse)], expected, "bfloat16")
        kept = np.asarray(pool)[:, 1].reshape(n, 2, -1, K, H)
        for source in range(n):
            keeper = (source + 1) % n
            slots = kept_slots[keeper, source]
            np.testing.assert_array_equal(kept[keeper, 0, slots], striped[1][source])
            np.testing.assert_array_equal(kept[keeper, 1, slots], striped[2][source])
        assert not np.asarray(pool)[:, 0].any()


def test_every_permute_runs_beside_attention_and_nothing_is_copied(mesh):
    if not is_hopper():
        pytest.skip("the schedule is read around Hopper's kernel")
    n, rows, pages = mesh.size, 16_384, 64
    by_rank = NamedSharding(mesh, P(AXIS))
    shapes = [
        ((n, 2, 2, pages, PAGE_SIZE, K, H), jnp.bfloat16),
        ((n, n, rows), jnp.int32),
        *(((n, rows, heads, H), jnp.bfloat16) for heads in (N, K, K)),
        ((n, rows), jnp.int32),
    ]
    with jax.default_matmul_precision(None):
        lowered = ring_over(mesh, "ring").lower(*(jax.ShapeDtypeStruct(*x, sharding=by_rank) for x in shapes))
    schedule = read_schedule(lowered.compile().as_text() or "")
    assert (schedule.beside_kernel, schedule.beside_nothing) == (n - 1, 0)
    assert schedule.copied_bytes < 1 << 20
