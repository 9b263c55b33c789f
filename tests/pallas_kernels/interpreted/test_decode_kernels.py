"""Both kernels of decode attention against loops in float64."""

import math

import numpy as np
import pytest

from loongjax.pallas_kernels.decode_attention.triton_kernels import attend_kernel, merge_kernel
from loongjax.pallas_kernels.kv_update.triton_variant import update_kernel
from tests.pallas_kernels.brute_force import attend_row
from tests.pallas_kernels.paged_case import PagedCase, make_case, random_queries
from tests.pallas_kernels.tolerance import assert_matches
from tests.pallas_kernels.triton_interpreter import interpret

BLOCK = 16


def decode(q: np.ndarray, case: PagedCase, num_shares: int) -> tuple[np.ndarray, np.ndarray]:
    """What `triton_decode_attention` does. Everything that no program writes is NaN."""
    (num_rows, num_q_heads, head_dim), (num_pages, page_size, num_kv_heads, _) = q.shape, case.kv_pool.shape[2:]
    group_size = num_q_heads // num_kv_heads
    o = np.full((num_rows, num_q_heads, head_dim), np.nan, np.float32)
    lse = np.full((num_rows, num_q_heads), np.nan, np.float32)
    partial_o = np.full((num_shares + num_rows, num_q_heads, head_dim), np.nan, np.float32)
    partial_lse = np.full((num_shares + num_rows, num_q_heads), np.nan, np.float32)
    shape = {
        "num_shares": num_shares,
        "padded_rows": max(2, 1 << (num_rows - 1).bit_length()),
        "head_dim": head_dim,
        "block": BLOCK,
    }
    layer = np.array([case.layer], np.int32)
    tables = (case.page_indices, case.page_starts, case.kv_lens)
    interpret(
        attend_kernel,
        (num_kv_heads, num_shares),
        *(q, case.kv_pool, layer, *tables, num_rows, num_pages, o, lse, partial_o, partial_lse),
        scale=head_dim**-0.5 * math.log2(math.e),
        num_kv_heads=num_kv_heads,
        group_size=group_size,
        padded_group=max(16, group_size),
        page_size=page_size,
        stages=2,
        **shape,
    )
    interpret(
        merge_kernel,
        (num_q_heads, num_shares + -(-num_rows // 4)),
        *(case.kv_lens, partial_o, partial_lse, o, lse, num_rows, o, lse),
        num_q_heads=num_q_heads,
        shares_per_step=4,
        rows_per_program=4,
        **shape,
    )
    return o, lse


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("num_shares", [1, 2, 7, 40])
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
def test_decode_attention_is_float64s_however_the_work_is_cut(kv_lens, heads, num_q_heads, page_size, num_shares):
    case = make_case(len(kv_lens), kv_lens, page_size=page_size, heads=heads)
    q = np.asarray(random_queries(1, len(kv_lens), num_q_heads, heads[1]))
    rows = [attend_row(*row) for row in zip(q, case.keys, case.values, strict=True)]
    expected = np.array([o for o, _ in rows]), np.array([lse for _, lse in rows])
    assert_matches(decode(q, case, num_shares), expected)


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
