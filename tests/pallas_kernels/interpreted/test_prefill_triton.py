"""prefill_attention's Triton kernel against loops in float64."""

import math

import numpy as np
import pytest
from triton.runtime import interpreter

from loongjax.pallas_kernels.prefill_attention.triton_kernel import prefill_kernel
from tests.pallas_kernels.brute_force import attend_ranges
from tests.pallas_kernels.tolerance import assert_matches
from tests.pallas_kernels.triton_interpreter import interpret

type Ranges = tuple[np.ndarray, np.ndarray]
BLOCK = 16
H = 16


def random_inputs(num_rows: int, num_keys: int, heads: tuple[int, int] = (1, 1), dtype: str = "float32"):
    rng = np.random.default_rng(num_rows + num_keys)
    shapes = (num_rows, heads[0], H), (num_keys, heads[1], H), (num_keys, heads[1], H)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def run(arrays, ranges, *, sm_scale: float = 0.25, out_dtype: str = "float32", block_q: int = BLOCK):
    """What `triton_prefill_attention` does. Everything that no program writes is NaN."""
    q, k, v = arrays
    (T, N, _), (S, K, _) = q.shape, k.shape
    o, lse = np.full(q.shape, np.nan, out_dtype), np.full((T, N), np.nan, np.float32)
    k_start, k_end = (np.asarray(bound, np.int32) for bound in ranges)
    interpret(
        prefill_kernel,
        (N // K * -(-T // block_q), K),
        *(q, k, v, k_start, k_end, T, S, o, lse),
        scale=sm_scale * math.log2(math.e),
        num_kv_heads=K,
        group_size=N // K,
        head_dim=H,
        block_q=block_q,
        block_k=BLOCK,
        stages=2,
    )
    return o, lse


def check(arrays, ranges, *, sm_scale: float = 0.25, **options) -> None:
    actual = run(arrays, ranges, sm_scale=sm_scale, **options)
    assert_matches(actual, attend_ranges(*arrays, *ranges, sm_scale=sm_scale), arrays[0].dtype.name)


def causal(num_rows: int, num_keys: int) -> Ranges:
    """The last `num_rows` tokens of a sequence of `num_keys`."""
    own = np.arange(num_rows) + num_keys - num_rows
    return own * 0, own + 1


@pytest.mark.parametrize("block_q", [16, 32])
@pytest.mark.parametrize(
    ("num_rows", "num_keys"), [(1, 1), (1, 100), (15, 16), (16, 17), (33, 5), (40, 40), (64, 64), (50, 131)]
)
def test_causal_attention_is_float64s(num_rows, num_keys, block_q):
    arrays = random_inputs(num_rows, num_keys)
    own = np.maximum(causal(num_rows, num_keys)[1], 0)
    check(arrays, (own * 0, own), block_q=block_q)


@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (5, 1)])
def test_query_heads_share_key_heads(heads):
    check(random_inputs(20, 50, heads), causal(20, 50))


@pytest.mark.parametrize("out_dtype", ["float16", "float32"])
def test_half_precision(out_dtype):
    arrays = random_inputs(20, 50, (2, 1), "float16")
    check(arrays, causal(20, 50), out_dtype=out_dtype)


@pytest.mark.parametrize("num_keys", [BLOCK, 2 * BLOCK, 3 * BLOCK + 1])
def test_keys_that_every_row_sees_need_no_mask(num_keys):
    check(random_inputs(20, num_keys), (np.zeros(20, int), np.full(20, num_keys)))


def test_packed_prompts():
    seq_lens = [3, 16, 1, 29, 2, 40]
    starts = np.repeat(np.cumsum(seq_lens) - seq_lens, seq_lens)
    check(random_inputs(91, 91), (starts, np.arange(91) + 1))


def test_a_sliding_window_is_masked_at_both_ends_of_its_bare_blocks():
    begin = np.arange(40)
    check(random_inputs(40, 130), (begin, begin + 85))


@pytest.mark.parametrize("past_edge", [-1, 0, 1])
def test_rows_that_begin_or_end_beside_a_blocks_edge(past_edge):
    k_start, k_end = np.full(BLOCK, 3), np.full(BLOCK, 3 + 5 * BLOCK)
    k_start[4] += BLOCK + past_edge
    k_end[9] -= BLOCK + past_edge
    check(random_inputs(BLOCK, 100), (k_start, k_end))


@pytest.mark.parametrize("seed", range(6))
def test_any_ranges_at_all(seed):
    bounds = np.random.default_rng(seed).integers(-5, 105, (2, 50))
    bounds[bounds == -5] = np.iinfo(np.int32).min
    bounds[bounds == 104] = np.iinfo(np.int32).max
    check(random_inputs(50, 100), bounds.clip(-100, 200) if seed % 2 else bounds)


def test_rows_without_keys_give_exactly_zero_and_minus_infinity():
    k_end = np.where((np.arange(60) % 2 == 1) | (np.arange(60) >= 30), 9, np.arange(60) + 40)
    arrays, ranges = random_inputs(60, 100), (np.full(60, 9), k_end)
    o, lse = run(arrays, ranges)
    assert (o[k_end == 9] == 0).all()
    assert (lse[k_end == 9] == -np.inf).all()
    check(arrays, ranges)


def test_nan_wherever_no_row_of_a_query_block_looks_is_harmless():
    q, k, v = random_inputs(2 * BLOCK, 200)
    # Of the first query block, two ranges far apart; of the second, one that begins and ends within blocks.
    k_start = np.where(np.arange(2 * BLOCK) % 2, 5, 150)
    k_end = np.where(np.arange(2 * BLOCK) % 2, 11, 161)
    k_start[BLOCK:], k_end[BLOCK:] = 70, 121
    expected = attend_ranges(q, k, v, k_start, k_end, sm_scale=0.25)
    seen = np.zeros(200, bool)
    for start, end in zip(k_start, k_end, strict=True):
        seen[start:end] = True
    k[~seen], v[~seen] = np.nan, np.nan
    assert_matches(run((q, k, v), (k_start, k_end)), expected)


# The second block's rows see nothing else.
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_another_query_blocks_keys_may_be_nan():
    q, k, v = random_inputs(2 * BLOCK, 64)
    k_start = np.repeat([0, 30], BLOCK)
    k_end = np.repeat([30, 64], BLOCK)
    expected = attend_ranges(q, k, v, k_start, k_end, sm_scale=0.25)
    k[30:], v[30:] = np.nan, np.nan
    o, lse = run((q, k, v), (k_start, k_end))
    assert_matches((o[:BLOCK], lse[:BLOCK]), (expected[0][:BLOCK], expected[1][:BLOCK]))


def test_large_finite_keys_and_values_that_a_row_does_not_see_are_harmless():
    q, k, v = random_inputs(BLOCK, 60)
    k_end = np.full(BLOCK, 37)
    k_end[-1] = 60
    expected = attend_ranges(q, k, v, k_end * 0, k_end, sm_scale=0.25)
    k[37:], v[37:] = 1e30, 1e30
    o, lse = run((q, k, v), (k_end * 0, k_end))
    assert_matches((o[:-1], lse[:-1]), (expected[0][:-1], expected[1][:-1]))


def test_keys_that_no_row_of_a_query_block_sees_are_not_read(monkeypatch):
    q, k, v = random_inputs(BLOCK, 400)
    k_start, k_end = np.full(BLOCK, 170), np.full(BLOCK, 230)
    k_start[3], k_end[3] = 20, 27
    load, loaded = interpreter.InterpreterBuilder.create_masked_load, []

    def record(builder, pointers, mask, *rest):
        loaded.append(pointers.data[mask.data])
        return load(builder, pointers, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", record)
    check([q, k, v], (k_start, k_end))
    addresses = np.unique(np.concatenate(loaded)).astype(np.int64)
    for x in (k, v):
        offsets = addresses - x.ctypes.data
        read = np.unique(offsets[(offsets >= 0) & (offsets < x.nbytes)] // x[0].nbytes)
        np.testing.assert_array_equal(read, [*range(20, 27), *range(170, 230)])


@pytest.mark.parametrize("sm_scale", [1.0, -0.2, 0.0])
def test_any_scale(sm_scale):
    check(random_inputs(20, 50), causal(20, 50), sm_scale=sm_scale)
