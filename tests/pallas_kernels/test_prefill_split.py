"""Few rows over many keys: heads side by side in a block, and keys in parts that are merged."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.pallas_kernels.prefill_attention import mosaic_gpu_launch, mosaic_gpu_split
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_split import (
    LEAST_PART,
    MOST_PARTS,
    choose_num_parts,
    cut_ranges,
    fold_heads,
    folds_heads,
    unfold_heads,
)
from loongjax.pallas_kernels.prefill_attention.visits import plan_visits
from tests.pallas_kernels.test_extend_on_hopper import check as check_extend
from tests.pallas_kernels.test_prefill_interpreted import causal, check, random_inputs


@pytest.fixture
def parts_made(monkeypatch) -> list[int]:
    """Keys are worth cutting from 128 a part on; collects into how many parts they were cut."""
    made: list[int] = []

    def choose(*sizes: int) -> int:
        made.append(choose_num_parts(*sizes))
        return made[-1]

    monkeypatch.setattr(mosaic_gpu_split, "LEAST_PART", 128)
    monkeypatch.setattr(mosaic_gpu_launch, "choose_num_parts", choose)
    return made


@pytest.mark.parametrize(
    ("heads", "num_rows", "num_programs", "parts"),
    [((1, 1), 130, 8, 4), ((4, 2), 20, 8, 4), ((4, 2), 20, 5, 2), ((6, 2), 70, 9, 2), ((2, 2), 5, 4, 2)],
)
def test_parts_of_the_keys_give_the_same_attention(parts_made, heads, num_rows, num_programs, parts):
    check(random_inputs(num_rows, 601, heads), causal(num_rows, 601), num_programs=num_programs)
    assert parts_made == [parts]


@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16"])
def test_rows_without_keys_and_rows_of_few_among_others(parts_made, out_dtype):
    k_start = np.array([0, 300, 511, 7, 650, 13, 640])
    k_end = np.array([650, 300, 512, 140, 650, 13, 650])
    check(random_inputs(7, 650, (2, 1)), (k_start, k_end), num_programs=8, out_dtype=out_dtype)
    assert parts_made == [5]


@pytest.mark.parametrize("sm_scale", [-0.2, 0.0])
def test_the_scale_may_be_any(parts_made, sm_scale):
    check(random_inputs(9, 520, (2, 1)), causal(9, 520), num_programs=4, sm_scale=sm_scale)
    assert parts_made == [4]


def test_more_thread_blocks_than_multiprocessors_are_no_reason_to_cut(parts_made, monkeypatch):
    monkeypatch.setattr(mosaic_gpu_launch, "num_multiprocessors", lambda: 2)
    check(random_inputs(130, 601), causal(130, 601), num_programs=1000)
    assert parts_made == [1]


def test_keys_stay_whole_where_float32_outputs_do_not_fit(parts_made, monkeypatch):
    monkeypatch.setattr(mosaic_gpu_launch, "has_room", lambda *shape: False)
    check(random_inputs(9, 520, (2, 1)), causal(9, 520), num_programs=4, out_dtype="bfloat16")


@pytest.mark.parametrize("page_size", [8, 16, 64])
def test_pages_in_parts(parts_made, page_size):
    check_extend([3, 0, 20], [500, 30, 311], page_size, num_programs=6)
    assert parts_made[0] > 1


def cut(k_start: np.ndarray, k_end: np.ndarray, num_parts: int, *, block_q: int) -> list[np.ndarray]:
    start, end = (jnp.asarray(x, jnp.int32) for x in (k_start, k_end))
    return [np.asarray(x) for x in cut_ranges(start, end, num_parts, block_q=block_q, block_kv=128, alignment=8)]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(-3, 5000)), min_size=1), st.integers(1, 16))
def test_parts_are_the_ranges_cut_at_whole_blocks(ranges, num_parts):
    k_start = np.array([start for start, _ in ranges])
    k_end = k_start + np.array([length for _, length in ranges])
    begins, ends = cut(k_start, k_end, num_parts, block_q=4)
    assert begins.shape == ends.shape == (num_parts, -(-len(ranges) // 4) * 4)
    for row, (start, end) in enumerate(zip(k_start, k_end, strict=True)):
        keys = [key for part in range(num_parts) for key in range(begins[part, row], ends[part, row])]
        assert keys == list(range(start, end))
    for part, first in itertools.product(range(num_parts), range(0, len(ranges), 4)):
        rows = range(first, min(first + 4, len(ranges)))
        cuts = {begins[part, row] for row in rows if k_start[row] < begins[part, row] < k_end[row]}
        assert len(cuts) <= 1, "rows of a block are cut at the same keys"


@pytest.mark.parametrize("num_parts", [1, 4, 11])
def test_parts_of_requests_that_share_a_block_are_no_longer_together_than_their_keys(num_parts):
    """And so are those of rows of about equal lengths."""
    two = np.repeat([3, 20_000], 64), np.repeat([20_000, 40_000], 64)
    for k_start, k_end in (two, causal(128, 32_832)):
        begins, ends = (jnp.asarray(x.ravel()) for x in cut(k_start, k_end, num_parts, block_q=128))
        visits = plan_visits(begins, ends, num_keys=80_000, block_q=128, block_kv=128, alignment=8)
        num_blocks = math.ceil((k_end.max() - k_start.min() // 8 * 8) / 128)
        assert visits.num_blocks.sum() == num_blocks
        assert visits.num_blocks.max() == math.ceil(num_blocks / num_parts)


def test_heads_side_by_side_and_back():
    q = np.arange(3 * 6 * 2).reshape(3, 6, 2)
    folded = np.asarray(fold_heads(jnp.asarray(q), 2))
    assert folded.shape == (9, 2, 2)
    for row, head in np.ndindex(3, 6):
        assert folded[row * 3 + head % 3, head // 3].tolist() == q[row, head].tolist()
    assert np.asarray(unfold_heads(jnp.asarray(folded), 6)).tolist() == q.tolist()


def test_heads_share_a_block_only_of_few_rows_that_see_many_keys():
    def folds(num_rows: int, num_keys: int = 100_000, heads: tuple[int, int] = (32, 8), num_requests: int = 1) -> bool:
        return folds_heads(num_rows, *heads, num_keys, 128, num_requests)

    assert [folds(num_rows) for num_rows in (1, 32, 64, 96, 127, 128, 512)] == [True] * 4 + [False] * 3
    assert not folds(32, heads=(8, 8))
    assert not folds(64, num_keys=64), "a short prompt has no keys to cut"
    assert [folds(num_rows, num_requests=4) for num_rows in (128, 511, 512, 1024)] == [True, True, False, False]
    assert [folds(num_rows, num_requests=64) for num_rows in (512, 513, 2048)] == [True, False, False]
    assert not folds(128, heads=(8, 8), num_requests=4)
    assert not folds(128, num_keys=64, num_requests=4)


def test_several_requests_in_as_many_blocks_visit_a_quarter_of_the_keys_if_heads_lie_side_by_side():
    k_start = np.repeat(np.arange(4) * 50_000, 32)

    def num_visits(repeats: int) -> tuple[int, int]:
        starts = jnp.asarray(np.repeat(k_start, repeats), jnp.int32)
        visits = plan_visits(starts, starts + 49_984, num_keys=200_000, block_q=128, block_kv=128)
        return len(visits.num_blocks), int(visits.num_blocks.sum())

    (num_blocks, total), (num_folded, folded_total) = num_visits(1), num_visits(4)
    assert num_blocks * 32 == num_folded * 8
    assert folded_total * 8 < total * 32 / 3.9


def test_few_items_are_cut_until_all_thread_blocks_have_one():
    assert choose_num_parts(128, 132, 200_000) == 1, "512 rows of 32 heads"
    assert choose_num_parts(64, 132, 200_000) == 2
    assert choose_num_parts(32, 132, 200_000) == 4
    assert choose_num_parts(8, 132, 200_000) == MOST_PARTS
    assert choose_num_parts(8, 132, 3 * LEAST_PART) == 3
    assert choose_num_parts(8, 132, 2 * LEAST_PART - 1) == 1
    assert choose_num_parts(1000, 132, 200_000) == 1


@settings(deadline=None)
@given(st.integers(1, 131), st.integers(1, 10**6))
def test_no_number_of_parts_is_much_better(num_items, num_keys):
    def rounds(parts: int) -> float:
        return math.ceil(num_items * parts / 132) / parts

    chosen = choose_num_parts(num_items, 132, num_keys)
    allowed = range(1, max(1, min(MOST_PARTS, num_keys // LEAST_PART)) + 1)
    assert chosen in allowed
    assert rounds(chosen) * 0.95 <= min(map(rounds, allowed))
