"""Both kernels of attention over the paged pool, as decode and as extend, against loops in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from loongjax.pallas_kernels.extend_attention.gather_pages import TOKENS, gather_kernel
from loongjax.pallas_kernels.extend_attention.triton_variant import cut_into_tiles, row_kv_lens
from loongjax.pallas_kernels.kv_update.triton_variant import update_kernel
from loongjax.pallas_kernels.paged_triton.kernels import attend_kernel, merge_kernel
from loongjax.pallas_kernels.paged_triton.launch import Tiles
from tests.pallas_kernels.brute_force import attend_requests, attend_row
from tests.pallas_kernels.paged_case import PagedCase, make_case, random_queries
from tests.pallas_kernels.tolerance import assert_matches
from tests.pallas_kernels.triton_interpreter import interpret

BLOCK = 16


def attend(
    q: np.ndarray,
    case: PagedCase,
    tiles: Tiles,
    row_kv_lens: np.ndarray,
    tile_queries: int,
    num_shares: int,
    stages: int,
) -> tuple[np.ndarray, np.ndarray]:
    """What `attend_tiles` does. Everything that no program writes is NaN."""
    (num_rows, num_q_heads, head_dim), (num_pages, page_size, num_kv_heads, _) = q.shape, case.kv_pool.shape[2:]
    group_size, num_tiles = num_q_heads // num_kv_heads, len(tiles.kv_lens)
    o = np.full((num_rows, num_q_heads, head_dim), np.nan, np.float32)
    lse = np.full((num_rows, num_q_heads), np.nan, np.float32)
    partial_o = np.full((num_shares + num_tiles, tile_queries, num_q_heads, head_dim), np.nan, np.float32)
    partial_lse = np.full((num_shares + num_tiles, tile_queries, num_q_heads), np.nan, np.float32)
    shape = {
        "num_shares": num_shares,
        "padded_tiles": max(2, 1 << (num_tiles - 1).bit_length()),
        "tile_queries": tile_queries,
        "head_dim": head_dim,
        "block": BLOCK,
    }
    layer = np.array([case.layer], np.int32)
    interpret(
        attend_kernel,
        (num_kv_heads, num_shares),
        *(q, case.kv_pool, layer, case.page_indices, *tiles, num_tiles, o, lse, partial_o, partial_lse),
        scale=head_dim**-0.5 * math.log2(math.e),
        num_pages=num_pages,
        num_kv_heads=num_kv_heads,
        group_size=group_size,
        padded_members=max(16, 1 << (tile_queries * group_size - 1).bit_length()),
        page_size=page_size,
        stages=stages,
        **shape,
    )
    lens = (tiles.q_starts, tiles.q_lens, tiles.kv_lens, row_kv_lens)
    interpret(
        merge_kernel,
        (num_q_heads, num_shares * tile_queries + -(-num_rows // 4)),
        *(*lens, partial_o, partial_lse, o, lse, num_tiles, num_rows, o, lse),
        num_q_heads=num_q_heads,
        shares_per_step=4,
        rows_per_program=4,
        **shape,
    )
    return o, lse


def decode(q: np.ndarray, case: PagedCase, num_shares: int, stages: int) -> tuple[np.ndarray, np.ndarray]:
    tiles = Tiles(case.page_starts, case.kv_lens, case.page_starts, case.kv_lens)
    return attend(q, case, tiles, case.kv_lens, 1, num_shares, stages)


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize(("num_shares", "stages"), [(1, 3), (2, 2), (7, 3), (40, 2)])
@pytest.mark.parametrize(
    ("kv_lens", "heads", "num_q_heads", "page_size"),
    [
        pytest.param([70, 0, 129, 1, 33], (2, 16), 4, 4, id="a mix, GQA"),
        pytest.param([BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK], (3, 16), 3, 1, id="block edges, MHA, tokens as pages"),
        pytest.param([400], (1, 16), 6, 64, id="one long row, MQA"),
        pytest.param([0, 0, 5], (1, 16), 2, 16, id="empty rows first"),
        pytest.param([0, 0], (2, 16), 2, 16, id="no keys at all"),
    ],
)
def test_decode_attention_is_float64s_however_the_work_is_cut(
    kv_lens, heads, num_q_heads, page_size, num_shares, stages
):
    case = make_case(len(kv_lens), kv_lens, page_size=page_size, heads=heads)
    q = np.asarray(random_queries(1, len(kv_lens), num_q_heads, heads[1]))
    rows = [attend_row(*row) for row in zip(q, case.keys, case.values, strict=True)]
    expected = np.array([o for o, _ in rows]), np.array([lse for _, lse in rows])
    assert_matches(decode(q, case, num_shares, stages), expected)


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize(("num_shares", "stages"), [(1, 3), (3, 2), (20, 3)])
@pytest.mark.parametrize("tile_queries", [2, 8])
@pytest.mark.parametrize(
    ("q_lens", "kv_lens", "heads", "num_q_heads"),
    [
        pytest.param([9, 1, 0, 4], [70, 33, 21, 0], (2, 16), 4, id="a mix, GQA"),
        pytest.param([17], [200], (1, 16), 3, id="one request, MQA of three heads"),
        pytest.param([3, 40, 1], [21, 0, 5], (1, 16), 2, id="a long request whose keys are others' matter"),
        pytest.param([0, 0], [5, 9], (2, 16), 2, id="no queries"),
    ],
)
def test_extend_attention_is_float64s_however_the_work_is_cut(
    q_lens, kv_lens, heads, num_q_heads, tile_queries, num_shares, stages
):
    num_padding = 3
    case = make_case(len(kv_lens), kv_lens, page_size=4, heads=heads)
    q = np.asarray(random_queries(1, sum(q_lens) + num_padding, num_q_heads, heads[1]))
    cu_q_lens = jnp.asarray(np.cumsum([0, *q_lens]), jnp.int32)
    page_starts, lens = jnp.asarray(case.page_starts), jnp.asarray(case.kv_lens)
    # No room for tiles of requests without keys, but for those left unfilled.
    num_queries = sum(q_len for q_len, kv_len in zip(q_lens, kv_lens, strict=True) if kv_len)
    cut = cut_into_tiles(cu_q_lens, page_starts, lens, num_queries=num_queries, tile_queries=tile_queries)
    tiles = Tiles(*(np.array(array) for array in cut))
    seen = np.array(row_kv_lens(cu_q_lens, lens, num_rows=len(q)))
    expected = attend_requests(q, q_lens, case.keys, case.values)
    assert_matches(attend(q, case, tiles, seen, tile_queries, num_shares, stages), expected)


def test_kv_update_writes_its_slots_and_nothing_else():
    rng = np.random.default_rng(0)
    pool = rng.standard_normal((2, 2, 6, 4, 3, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, 7, 3, 8)).astype(np.float32)
    slots = np.array([5, -1, 23, 0, 24, 17, np.iinfo(np.int32).max], np.int32)
    expected = pool.copy()
    for token, slot in enumerate(slots):
        if 0 <= slot < 24:
            expected[1, 0, slot // 4, slot % 4] = k[token]
            expected[1, 1, slot // 4, slot % 4] = v[token]
    layer = np.array([1], np.int32)
    interpret(update_kernel, (7,), pool, k, v, layer, slots, 24, pool, row_size=24, padded_row=32)
    np.testing.assert_array_equal(pool, expected)


@pytest.mark.parametrize("num_programs", [2, 20])
@pytest.mark.parametrize("page_size", [1, 2, 4])
@pytest.mark.parametrize("num_used", [0, 1, TOKENS, TOKENS + 1, 10**9])
def test_gather_brings_the_used_pages_into_order_and_leaves_the_rest_alone(page_size, num_used, num_programs):
    rng = np.random.default_rng(page_size)
    num_pages, num_entries, heads = 40, 30, (3, 8)
    pool = rng.standard_normal((2, 2, num_pages, page_size, *heads)).astype(np.float32)
    pages = rng.permutation(num_pages)[:num_entries].astype(np.int32)
    num_rows = -(-num_entries * page_size // 8) * 8
    k, v = (np.full((num_rows, *heads), np.nan, np.float32) for _ in range(2))
    layer, used = np.array([1], np.int32), np.array([num_used], np.int32)
    interpret(
        gather_kernel,
        (num_programs,),
        *(pool, layer, pages, used, num_entries, num_pages, k, v),
        page_size=page_size,
        row_size=24,
        padded_row=32,
        tokens=TOKENS,
    )
    num_moved = min(num_used, num_entries * page_size)
    for kind, found in enumerate((k, v)):
        np.testing.assert_array_equal(found[:num_moved], pool[1, kind][pages].reshape(-1, *heads)[:num_moved])
        assert np.isnan(found[num_moved:]).all()


def test_gather_takes_entries_that_no_request_names_for_some_page():
    pool = np.arange(2 * 3 * 2 * 8, dtype=np.float32).reshape(1, 2, 3, 2, 1, 8)
    pages = np.array([2, np.iinfo(np.int32).max, -7, 1], np.int32)
    k, v = (np.full((8, 1, 8), np.nan, np.float32) for _ in range(2))
    layer, used = np.array([0], np.int32), np.array([8], np.int32)
    shape = {"page_size": 2, "row_size": 8, "padded_row": 8, "tokens": TOKENS}
    interpret(gather_kernel, (1,), pool, layer, pages, used, 4, 3, k, v, **shape)
    for kind, found in enumerate((k, v)):
        np.testing.assert_array_equal(found.reshape(4, 2, 1, 8), pool[0, kind][[2, 2, 0, 1]])
