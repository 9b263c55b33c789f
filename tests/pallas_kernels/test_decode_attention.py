"""decode_attention: both variants against loops in float64, over pools poisoned wherever no table points."""

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

from loongjax.errors import ConfigError
from loongjax.pallas_kernels import decode_attention
from loongjax.pallas_kernels.decode_attention import blockwise
from tests.pallas_kernels.brute_force import attend_row
from tests.pallas_kernels.paged_case import PagedCase, make_case, random_queries
from tests.pallas_kernels.tolerance import assert_matches

SMALL_STEPS = functools.partial(
    blockwise.blockwise_decode_attention,
    sm_scale=16**-0.5,
    out_dtype=jnp.dtype("float32"),
    tuning=blockwise.DecodeTuning(block_tokens=4, blocks_per_step=3),
)
VARIANTS: dict[str, Callable] = {
    "reference": functools.partial(decode_attention, implementation="reference"),
    "blockwise": functools.partial(decode_attention, implementation="blockwise"),
    "small steps": SMALL_STEPS,
}
B, N, H = 5, 4, 16


def expected(q: jax.Array, case: PagedCase) -> tuple[np.ndarray, np.ndarray]:
    rows = [attend_row(*row) for row in zip(np.asarray(q), case.keys, case.values, strict=True)]
    return np.array([o for o, _ in rows]), np.array([lse for _, lse in rows])


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=10, deadline=None)
@given(kv_lens=st.lists(st.integers(0, 40), min_size=B, max_size=B), seed=st.integers(0, 99))
def test_every_row_attends_to_exactly_its_own_keys(variant, page_size, kv_lens, seed):
    case = make_case(seed, kv_lens, page_size=page_size, num_pages=200, num_entries=220)
    q = random_queries(seed, B, N, H)
    assert_matches(VARIANTS[variant](q, *case.arguments), expected(q, case))


@pytest.mark.parametrize(
    ("num_q_heads", "heads", "dtype"),
    [
        pytest.param(4, (4, 64), "float32", id="MHA"),
        pytest.param(4, (4, 64), "float16", id="MHA, float16"),
        pytest.param(8, (2, 128), "bfloat16", id="GQA, bfloat16"),
        pytest.param(4, (1, 16), "float32", id="MQA"),
    ],
)
def test_heads_and_dtypes_agree_with_float64(num_q_heads, heads, dtype):
    case = make_case(1, [70, 0, 129, 1], page_size=16, heads=heads, dtype=dtype)
    q = random_queries(2, 4, num_q_heads, heads[1], dtype)
    for implementation in ("reference", "blockwise"):
        o, lse = decode_attention(q, *case.arguments, implementation=implementation)
        assert o.dtype == dtype
        assert_matches((o, lse), expected(q, case), dtype)


def test_a_long_row_among_short_ones():
    case = make_case(3, [1, 700, 2, 0, 3, 1, 0, 9], page_size=1)
    q = random_queries(4, 8, N, H)
    assert_matches(decode_attention(q, *case.arguments), expected(q, case))


def test_pages_larger_than_a_block():
    case = make_case(5, [300, 128, 5], page_size=128)
    q = random_queries(6, 3, N, H)
    assert_matches(decode_attention(q, *case.arguments), expected(q, case))


def test_rows_may_share_a_table():
    case = make_case(7, [21], page_size=4)
    q = random_queries(8, 3, N, H)
    pool, layer, page_indices, page_starts, kv_lens = case.arguments
    shared = decode_attention(q, pool, layer, page_indices, jnp.repeat(page_starts, 3), jnp.repeat(kv_lens, 3))
    rows = [attend_row(row, case.keys[0], case.values[0]) for row in np.asarray(q)]
    assert_matches(shared, (np.array([o for o, _ in rows]), np.array([lse for _, lse in rows])))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kv_lens", [[0, 0, 0], []], ids=["rows without keys", "no rows"])
def test_nothing_to_attend_to(variant, kv_lens):
    case = make_case(9, kv_lens, page_size=4)
    q = random_queries(10, len(kv_lens), N, H)
    o, lse = VARIANTS[variant](q, *case.arguments)
    np.testing.assert_array_equal(o, np.zeros(q.shape))
    np.testing.assert_array_equal(lse, np.full(q.shape[:-1], -np.inf))


def test_an_empty_table_serves_rows_without_keys():
    case = make_case(9, [0, 0], page_size=4, num_entries=0)
    for variant in VARIANTS.values():
        _, lse = variant(random_queries(10, 2, N, H), *case.arguments)
        assert (np.asarray(lse) == -np.inf).all()


def test_two_runs_give_the_same_bits():
    case = make_case(11, [33, 4, 0, 18, 60], page_size=4)
    q = random_queries(12, B, N, H)
    for first, second in zip(SMALL_STEPS(q, *case.arguments), SMALL_STEPS(q, *case.arguments), strict=True):
        np.testing.assert_array_equal(first, second)


def test_the_scale_and_the_output_dtype_are_the_callers():
    case = make_case(13, [17, 3], page_size=4, dtype="bfloat16")
    q = random_queries(14, 2, N, H, "bfloat16")
    rows = [attend_row(*row, 0.7) for row in zip(np.asarray(q), case.keys, case.values, strict=True)]
    for implementation in ("reference", "blockwise"):
        o, lse = decode_attention(
            q, *case.arguments, sm_scale=0.7, out_dtype=jnp.float32, implementation=implementation
        )
        assert o.dtype == lse.dtype == jnp.float32
        assert_matches((o, lse), (np.array([o for o, _ in rows]), np.array([lse for _, lse in rows])), "bfloat16")


def test_work_is_proportional_to_the_number_of_keys(monkeypatch):
    steps = []

    def counting_attend_blocks(*arguments):
        jax.debug.callback(lambda: steps.append(1))
        return original(*arguments)

    original = blockwise._attend_blocks
    monkeypatch.setattr(blockwise, "_attend_blocks", counting_attend_blocks)
    # Blocks of 8 keys: 1 + 5 + 0 + 2 = 8 of them, 4 a step; the table has room for 500 pages.
    case = make_case(15, [3, 40, 0, 11], page_size=4, num_entries=500)
    q = random_queries(16, 4, N, H)
    tuning = blockwise.DecodeTuning(block_tokens=8, blocks_per_step=4)
    result = blockwise.blockwise_decode_attention(
        q, *case.arguments, sm_scale=0.25, out_dtype=jnp.dtype("float32"), tuning=tuning
    )
    jax.effects_barrier()
    assert len(steps) == 2
    assert_matches(result, expected(q, case))


def test_the_pool_is_never_copied():
    pool = jax.ShapeDtypeStruct((4, 2, 1024, 16, 2, 64), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((8, 8, 64), jnp.bfloat16)
    layer, table, rows = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((), (1024,), (8,)))
    compiled = jax.jit(decode_attention).lower(q, pool, layer, table, rows, rows).compile()
    keys_of_one_layer = 1024 * 16 * 2 * 64 * 2
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < keys_of_one_layer / 2


@pytest.mark.parametrize("check_vma", [True, False])
def test_replicated_queries_against_a_pool_for_each_device_inside_shard_map(check_vma):
    mesh = Mesh(np.array(jax.devices())[[1, 4, 6]], ("sp",))
    kv_lens = [[9, 0, 30], [0, 2, 1], [17, 5, 0]]
    cases = [make_case(seed, lens, page_size=4, num_pages=20, num_entries=30) for seed, lens in enumerate(kv_lens)]
    q = random_queries(17, 3, N, H)
    stacked = [jnp.stack(arrays) for arrays in zip(*(case.arguments for case in cases), strict=True)]

    def attend(q, *arguments):
        o, lse = decode_attention(q, *(x[0] for x in arguments))
        return o[None], lse[None]

    in_specs = (P(), *[P("sp")] * 5)
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=in_specs, out_specs=P("sp"), check_vma=check_vma)
    o, lse = jax.jit(sharded)(q, *stacked)
    for rank, case in enumerate(cases):
        assert_matches((o[rank], lse[rank]), expected(q, case))


def test_a_variant_that_is_not_built_says_so():
    case = make_case(0, [3], page_size=4)
    with pytest.raises(NotImplementedError, match="mosaic_gpu"):
        decode_attention(random_queries(0, 1, N, H), *case.arguments, implementation="mosaic_gpu")


def test_heads_that_do_not_group_are_refused():
    case = make_case(0, [3], page_size=4)
    with pytest.raises(ValueError, match="query heads must be a multiple of KV heads, got 3 and 2"):
        decode_attention(random_queries(0, 1, 3, H), *case.arguments)


def test_tuning_is_positive():
    with pytest.raises(ConfigError, match=r"self\.blocks_per_step=0"):
        blockwise.DecodeTuning(blocks_per_step=0)
