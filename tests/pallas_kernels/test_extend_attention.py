"""extend_attention: both variants against loops in float64, and merged with the new tokens' own attention."""

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
from loongjax.pallas_kernels import extend_attention, merge_attention, prefill_attention
from loongjax.pallas_kernels.extend_attention import blockwise
from tests.pallas_kernels.brute_force import attend_requests, attend_sequences
from tests.pallas_kernels.paged_case import PagedCase, make_case, random_queries
from tests.pallas_kernels.tolerance import assert_matches

SMALL_BLOCKS = functools.partial(
    blockwise.blockwise_extend_attention,
    sm_scale=16**-0.5,
    out_dtype=jnp.dtype("float32"),
    tuning=blockwise.ExtendTuning(block_q=4, block_tokens=8),
)
VARIANTS: dict[str, Callable] = {
    "reference": functools.partial(extend_attention, implementation="reference"),
    "blockwise": functools.partial(extend_attention, implementation="blockwise"),
    "small blocks": SMALL_BLOCKS,
}
T, B, N, H = 40, 4, 4, 16


def cumulative(q_lens: list[int]) -> np.ndarray:
    return np.cumsum([0, *q_lens]).astype(np.int32)


def expected(q: jax.Array, q_lens: list[int], case: PagedCase) -> tuple[np.ndarray, np.ndarray]:
    return attend_requests(np.asarray(q), q_lens, case.keys, case.values)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=12, deadline=None)
@given(
    q_lens=st.lists(st.integers(0, 10), min_size=B, max_size=B),
    kv_lens=st.lists(st.integers(0, 30), min_size=B, max_size=B),
    seed=st.integers(0, 99),
)
def test_every_token_attends_to_all_keys_of_its_request(variant, q_lens, kv_lens, seed):
    case = make_case(seed, kv_lens, page_size=4, num_pages=40, num_entries=50)
    q = random_queries(seed, T, N, H)
    actual = VARIANTS[variant](q, jnp.asarray(cumulative(q_lens)), *case.arguments)
    assert_matches(actual, expected(q, q_lens, case))


@pytest.mark.parametrize(
    ("num_q_heads", "heads", "dtype"),
    [pytest.param(2, (2, 64), "float16", id="MHA, float16"), pytest.param(8, (2, 128), "bfloat16", id="GQA, bfloat16")],
)
def test_heads_and_dtypes_agree_with_float64(num_q_heads, heads, dtype):
    q_lens = [70, 1, 29]
    case = make_case(1, [300, 17, 0], page_size=16, heads=heads, dtype=dtype)
    q = random_queries(2, 100, num_q_heads, heads[1], dtype)
    o, lse = extend_attention(q, jnp.asarray(cumulative(q_lens)), *case.arguments)
    assert o.dtype == dtype
    assert_matches((o, lse), expected(q, q_lens, case), dtype)


def test_old_keys_merged_with_new_ones_are_the_whole_sequence():
    old_lens, new_lens = [9, 0, 21], [7, 5, 1]
    case = make_case(3, old_lens, page_size=4)
    rng = np.random.default_rng(4)
    new = [rng.standard_normal((2, length, 2, H)).astype(np.float32) for length in new_lens]
    q = random_queries(5, sum(new_lens), N, H)
    row_starts = np.repeat(np.cumsum(new_lens) - new_lens, new_lens).astype(np.int32)
    k, v = np.concatenate(new, axis=1)
    own = prefill_attention(
        q, jnp.asarray(k), jnp.asarray(v), jnp.asarray(row_starts), jnp.arange(1, len(row_starts) + 1, dtype=jnp.int32)
    )
    old = extend_attention(q, jnp.asarray(cumulative(new_lens)), *case.arguments)

    outputs, log_sum_exps = [], []
    for request, (length, start) in enumerate(zip(new_lens, cumulative(new_lens), strict=False)):
        keys, values = (
            np.concatenate([before[request], after])
            for before, after in zip((case.keys, case.values), new[request], strict=True)
        )
        whole_q = np.zeros((len(keys), N, H), np.float32)
        whole_q[-length:] = q[start : start + length]
        o, lse = attend_sequences(whole_q, keys, values, [len(keys)])
        outputs.append(o[-length:])
        log_sum_exps.append(lse[-length:])
    assert_matches(merge_attention(*old, *own), (np.concatenate(outputs), np.concatenate(log_sum_exps)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_rows_give_exactly_zero_and_minus_infinity(variant):
    case = make_case(6, [12], page_size=4)
    o, lse = VARIANTS[variant](random_queries(7, 9, N, H), jnp.array([0, 5], jnp.int32), *case.arguments)
    assert (np.asarray(o)[5:] == 0).all()
    assert (np.asarray(lse)[5:] == -np.inf).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("num_rows", "kv_lens"), [(0, [3]), (3, [])], ids=["no tokens", "no requests"])
def test_nothing_to_attend_to(variant, num_rows, kv_lens):
    case = make_case(8, kv_lens, page_size=4)
    cu_q_lens = jnp.zeros(len(kv_lens) + 1, jnp.int32)
    o, lse = VARIANTS[variant](random_queries(9, num_rows, N, H), cu_q_lens, *case.arguments)
    np.testing.assert_array_equal(o, np.zeros((num_rows, N, H)))
    np.testing.assert_array_equal(lse, np.full((num_rows, N), -np.inf))


@pytest.mark.parametrize("check_vma", [True, False])
def test_replicated_queries_against_a_pool_for_each_device_inside_shard_map(check_vma):
    mesh = Mesh(np.array(jax.devices())[[2, 5]], ("sp",))
    q_lens = [5, 3]
    cases = [
        make_case(seed, lens, page_size=4, num_pages=9, num_entries=14) for seed, lens in enumerate([[9, 0], [4, 13]])
    ]
    q = random_queries(10, 8, N, H)
    stacked = [jnp.stack(arrays) for arrays in zip(*(case.arguments for case in cases), strict=True)]

    def attend(q, cu_q_lens, *arguments):
        o, lse = extend_attention(q, cu_q_lens, *(x[0] for x in arguments))
        return o[None], lse[None]

    in_specs = (P(), P(), *[P("sp")] * 5)
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=in_specs, out_specs=P("sp"), check_vma=check_vma)
    o, lse = jax.jit(sharded)(q, cumulative(q_lens), *stacked)
    for rank, case in enumerate(cases):
        assert_matches((o[rank], lse[rank]), expected(q, q_lens, case))


def test_tuning_is_positive():
    with pytest.raises(ConfigError, match=r"self\.block_q=0"):
        blockwise.ExtendTuning(block_q=0)
