"""prefill_attention's kernels on the GPU, Hopper's and the one in Triton, against the float32 reference."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from loongjax.pallas_kernels import merge_attention, prefill_attention
from loongjax.parallel.striped import visible_ranges
from tests.pallas_kernels.tolerance import assert_matches

pytestmark = pytest.mark.gpu

type Ranges = tuple[np.ndarray, np.ndarray]


@pytest.fixture(params=["mosaic_gpu", "triton"])
def implementation(request) -> str:
    if request.param == "mosaic_gpu" and getattr(jax.devices()[0], "compute_capability", "") != "9.0":
        pytest.skip("needs a Hopper GPU")
    return request.param


@pytest.fixture(autouse=True)
def exact_reference() -> Iterator[None]:
    # The reference's float32 products must not be rounded to tf32.
    with jax.default_matmul_precision("highest"):
        yield


def random_inputs(shape: tuple[int, int, int, int, int], dtype: str = "bfloat16", seed: int = 0) -> list[np.ndarray]:
    """q, k, v of the shape (T, S, N, K, H)."""
    rng = np.random.default_rng(seed)
    T, S, N, K, H = shape
    return [np.array(jnp.asarray(rng.standard_normal(x), dtype)) for x in ((T, N, H), (S, K, H), (S, K, H))]


def causal(num_rows: int, num_keys: int) -> Ranges:
    """The last `num_rows` tokens of a sequence of `num_keys`."""
    own = np.arange(num_rows, dtype=np.int32) + num_keys - num_rows
    return np.zeros(num_rows, np.int32), own + 1


def full(num_rows: int, num_keys: int) -> Ranges:
    return np.zeros(num_rows, np.int32), np.full(num_rows, num_keys, np.int32)


def packed(seq_lens: list[int]) -> Ranges:
    """Causal within each of the sequences packed one after another."""
    starts = np.repeat(np.cumsum(seq_lens) - seq_lens, seq_lens).astype(np.int32)
    return starts, np.arange(sum(seq_lens), dtype=np.int32) + 1


def random_ranges(num_rows: int, num_keys: int, seed: int = 1) -> Ranges:
    """Any ranges at all, many of them empty."""
    bounds = np.random.default_rng(seed).integers(-5, num_keys + 5, (2, num_rows)).astype(np.int32)
    return bounds[0], bounds[1]


def on_device(*arrays: np.ndarray, implementation: str, **options) -> tuple[jax.Array, jax.Array]:
    q, k, v, k_start, k_end = (jnp.asarray(x) for x in arrays)
    return prefill_attention(q, k, v, k_start, k_end, implementation=implementation, **options)


def check(implementation: str, arrays: list[np.ndarray], ranges: Ranges, **options) -> None:
    """The variant gives the reference's result, and the same bits when it runs again."""
    attend = functools.partial(on_device, *arrays, *ranges, implementation=implementation, **options)
    actual = [np.asarray(x) for x in attend()]
    for first, second in zip(actual, attend(), strict=True):
        np.testing.assert_array_equal(first.view(np.uint8), np.asarray(second).view(np.uint8))
    options |= {"out_dtype": jnp.float32}
    expected = on_device(*arrays, *ranges, implementation="reference", **options)
    assert_matches(actual, expected, arrays[0].dtype.name)


@pytest.mark.parametrize("out_dtype", [None, "float32"])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (8, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_dtype_head_dim_and_grouping(implementation, dtype, head_dim, heads, out_dtype):
    arrays = random_inputs((1024, 1024, *heads, head_dim), dtype)
    check(implementation, arrays, causal(1024, 1024), out_dtype=out_dtype)


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (12, 4)], ids=["MHA", "GQA", "groups of three"])
@pytest.mark.parametrize("head_dim", [32, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_head_dims_that_only_triton_takes(dtype, head_dim, heads):
    arrays = random_inputs((500, 700, *heads, head_dim), dtype)
    for ranges in (causal(500, 700), full(500, 700), random_ranges(500, 700)):
        check("triton", arrays, ranges)


@pytest.mark.parametrize(
    ("num_keys", "ranges"),
    [
        pytest.param(4096, full(1024, 4096), id="full"),
        pytest.param(4096, causal(1024, 4096), id="causal, behind a prefix"),
        pytest.param(2048, packed([1, 2, 61, 64, 127, 128, 129, 1000, 536]), id="packed"),
        pytest.param(1024, packed([16] * 64), id="many short"),
        pytest.param(700, random_ranges(1000, 700), id="any ranges"),
        pytest.param(700, (np.full(300, 5, np.int32), np.full(300, 5, np.int32)), id="no keys at all"),
        pytest.param(700, (np.full(300, -9, np.int32), np.full(300, 9999, np.int32)), id="beyond the ends"),
        pytest.param(500, (np.arange(300, dtype=np.int32), np.arange(300, dtype=np.int32) + 90), id="sliding window"),
    ],
)
def test_masks(implementation, num_keys, ranges):
    num_rows = len(ranges[0])
    check(implementation, random_inputs((num_rows, max(num_keys, num_rows), 4, 2, 128)), ranges)


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=["MHA", "GQA"])
def test_thread_blocks_that_wait_for_each_other(implementation, heads):
    """Keys so long that they do; some rows see few of them, so that shares are uneven and some end early."""
    num_rows, num_keys = 4096, 36_000
    k_start, k_end = causal(num_rows, num_keys)
    k_start = np.where(np.arange(num_rows) % 1024 < 200, k_end - 300, k_start).astype(np.int32)
    check(implementation, random_inputs((num_rows, num_keys, *heads, 128)), (k_start, k_end))


@pytest.mark.parametrize(
    ("num_rows", "num_keys"),
    [(1, 1), (1, 1001), (63, 7), (64, 64), (65, 63), (65, 65), (127, 129), (127, 1001), (129, 1), (129, 127)],
)
def test_odd_and_tiny_shapes(implementation, num_rows, num_keys):
    arrays = random_inputs((num_rows, num_keys, 2, 1, 128))
    check(implementation, arrays, full(num_rows, num_keys))
    check(implementation, arrays, causal(num_rows, num_keys))


def test_rows_without_keys_among_others_give_zero_and_minus_infinity(implementation):
    arrays = random_inputs((200, 512, 4, 2, 128))
    k_end = np.where(np.arange(200) % 3 == 1, 0, np.arange(200) + 1).astype(np.int32)
    ranges = np.zeros(200, np.int32), k_end
    check(implementation, arrays, ranges)
    o, lse = on_device(*arrays, *ranges, implementation=implementation)
    assert (np.asarray(o.astype(jnp.float32))[k_end == 0] == 0).all()
    assert (np.asarray(lse)[k_end == 0] == -np.inf).all()


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_striped_ring_steps_merge_to_the_whole(implementation, num_ranks):
    T, N, K, H = 2048, 4, 2, 128
    starts, ends = packed([700, 1, 1000, 347])
    q, k, v = (jnp.asarray(x) for x in random_inputs((T, T, N, K, H)))
    expected = prefill_attention(
        q, k, v, jnp.asarray(starts), jnp.asarray(ends), out_dtype=jnp.float32, implementation="reference"
    )
    for rank in range(num_ranks):
        own = slice(rank, None, num_ranks)
        row_starts = jnp.asarray(starts[own])
        o, lse = jnp.zeros((T // num_ranks, N, H)), jnp.full((T // num_ranks, N), -jnp.inf)
        for source in range(num_ranks):
            keys = slice(source, None, num_ranks)
            k_start, k_end = visible_ranges(row_starts, jnp.int32(rank), jnp.int32(source), num_ranks)
            new = prefill_attention(
                q[own], k[keys], v[keys], k_start, k_end, out_dtype=jnp.float32, implementation=implementation
            )
            o, lse = merge_attention(o, lse, new[0], new[1])
        assert_matches((o, lse), (expected[0][own], expected[1][own]), "bfloat16")


def test_nan_in_keys_outside_all_ranges_is_harmless(implementation):
    q, k, v = random_inputs((300, 1024, 4, 2, 128))
    k_start, k_end = np.full(300, 136, np.int32), np.full(300, 520, np.int32)
    ranges = k_start, k_end
    clean = on_device(q, k, v, *ranges, implementation=implementation)
    for x in (k, v):
        # The visited blocks end with the ranges, at 136 + 3 * 128.
        x[:136] = np.nan
        x[520:] = np.nan
    for actual, expected in zip(on_device(q, k, v, *ranges, implementation=implementation), clean, strict=True):
        np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


def test_nan_in_keys_and_large_finite_values_inside_a_visited_block_are_harmless(implementation):
    q, k, v = random_inputs((100, 512, 4, 2, 128))
    ranges = np.full(100, 13, np.int32), np.full(100, 300, np.int32)
    clean = on_device(q, k, v, *ranges, implementation=implementation)
    for begin, end in ((0, 13), (300, 512)):
        k[begin:end] = np.nan
        v[begin:end] = 3e38
    for actual, expected in zip(on_device(q, k, v, *ranges, implementation=implementation), clean, strict=True):
        np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_triton_takes_nan_in_every_key_outside_all_ranges_also_between_two(head_dim):
    q, k, v = random_inputs((300, 1024, 4, 2, head_dim))
    is_odd = np.arange(300) % 2 == 1
    ranges = np.where(is_odd, 13, 700).astype(np.int32), np.where(is_odd, 150, 721).astype(np.int32)
    clean = on_device(q, k, v, *ranges, implementation="triton")
    for x in (k, v):
        for begin, end in ((0, 13), (150, 700), (721, 1024)):
            x[begin:end] = np.nan
    for actual, expected in zip(on_device(q, k, v, *ranges, implementation="triton"), clean, strict=True):
        np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))
    check("triton", [q, k, v], ranges)


def test_more_elements_than_32_bits_count(implementation):
    N, H, num_last = 32, 128, 200
    num_rows = 2**31 // (N * H) + num_last
    q, k, v = (jnp.asarray(x) for x in random_inputs((num_last, num_last, N, N, H)))
    k_start, k_end = (jnp.asarray(bound) for bound in causal(num_last, num_last))

    def behind_zeros(x: jax.Array) -> jax.Array:
        return jnp.zeros((num_rows, *x.shape[1:]), x.dtype).at[-num_last:].set(x)

    o, lse = prefill_attention(
        behind_zeros(q),
        behind_zeros(k),
        behind_zeros(v),
        behind_zeros(k_start + num_rows - num_last),
        behind_zeros(k_end + num_rows - num_last),
        implementation=implementation,
    )
    expected = prefill_attention(q, k, v, k_start, k_end, out_dtype=jnp.float32, implementation="reference")
    assert_matches((o[-num_last:], lse[-num_last:]), expected, "bfloat16")
    assert not o[:-num_last].any()
    assert (lse[:-num_last] == -jnp.inf).all()


@pytest.mark.parametrize("sm_scale", [0.5, 1e-3, -0.1, 0.0])
def test_the_scale_is_the_callers(implementation, sm_scale):
    check(implementation, random_inputs((200, 300, 2, 1, 128)), causal(200, 300), sm_scale=sm_scale)


def test_scores_of_any_size_neither_overflow_nor_vanish(implementation):
    q, k, v = random_inputs((128, 512, 2, 1, 128))
    check(implementation, [(q * 30).astype(q.dtype), k, v], causal(128, 512), out_dtype="float32")


def test_inside_shard_map_and_a_loop(implementation):
    mesh = Mesh(np.array(jax.devices()[-1:]), ("ring",))
    arrays = [jnp.asarray(x) for x in (*random_inputs((256, 512, 4, 2, 128)), *causal(256, 512))]

    def twice(*arrays):
        def body(_, carry):
            o, lse = prefill_attention(*arrays, implementation=implementation)
            return merge_attention(carry[0], carry[1], o, lse)

        nothing = jnp.zeros((256, 4, 128)), jnp.full((256, 4), -jnp.inf)
        return jax.lax.fori_loop(0, 2, body, nothing)

    sharded = jax.shard_map(twice, mesh=mesh, in_specs=P("ring"), out_specs=P("ring"), check_vma=False)
    o, lse = jax.jit(sharded)(*arrays)
    expected = prefill_attention(*arrays, out_dtype=jnp.float32, implementation="reference")
    # Every key counted twice: the same output, and twice the sum.
    assert_matches((o, lse), (expected[0], expected[1] + np.log(2)), "bfloat16")
