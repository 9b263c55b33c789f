"""The Hopper variant of prefill_attention, interpreted on the CPU: every key block, mask, barrier and copy of it."""

import jax.numpy as jnp
import numpy as np
import pytest

from loongjax.pallas_kernels.prefill_attention.mosaic_gpu import mosaic_gpu_prefill_attention
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_tuning import PrefillTuning
from tests.pallas_kernels.brute_force import attend_ranges
from tests.pallas_kernels.mosaic_interpreter import interpreted
from tests.pallas_kernels.tolerance import assert_matches

H = 64


def random_inputs(num_rows: int, num_keys: int, heads: tuple[int, int] = (1, 1), dtype: str = "bfloat16"):
    rng = np.random.default_rng(num_rows + num_keys)
    shapes = (num_rows, heads[0], H), (num_keys, heads[1], H), (num_keys, heads[1], H)
    return [np.array(jnp.asarray(rng.standard_normal(shape), dtype)) for shape in shapes]


def run(arrays, ranges, *, out_dtype="float32", sm_scale=0.1, detect_races=False, **tuning):
    q, k, v, k_start, k_end = (jnp.asarray(x) for x in (*arrays, *(np.asarray(x, np.int32) for x in ranges)))
    with interpreted(detect_races=detect_races):
        return mosaic_gpu_prefill_attention(
            q,
            k,
            v,
            k_start,
            k_end,
            sm_scale=sm_scale,
            out_dtype=jnp.dtype(out_dtype),
            tuning=PrefillTuning(**tuning),
        )


def truth(arrays, ranges, sm_scale=0.1):
    q, k, v = arrays
    k_start, k_end = ranges
    return attend_ranges(q, k, v, k_start, k_end, sm_scale)


def check(arrays, ranges, *, sm_scale=0.1, **options):
    actual = run(arrays, ranges, sm_scale=sm_scale, **options)
    assert_matches(actual, truth(arrays, ranges, sm_scale), arrays[0].dtype.name)


def causal(num_rows: int, num_keys: int) -> tuple[np.ndarray, np.ndarray]:
    """The last `num_rows` tokens of a sequence of `num_keys`."""
    own = np.arange(num_rows) + num_keys - num_rows
    return own * 0, own + 1


@pytest.mark.parametrize(
    "tuning",
    [
        {},
        {"block_kv": 64, "num_stages": 4},
        {"block_q": 192, "block_kv": 64, "num_stages": 3},
        {"block_kv": 192},
        {"num_programs": 1, "num_stages": 3},
        {"num_programs": 3},
        {"num_programs": 3, "block_q": 192, "block_kv": 64},
        {"num_programs": 1000},
    ],
    ids=str,
)
def test_every_tuning_gives_the_same_attention(tuning):
    check(random_inputs(200, 500), causal(200, 500), **tuning)


@pytest.mark.parametrize("num_programs", [None, 2])
def test_no_access_to_shared_memory_races_with_another(num_programs):
    check(random_inputs(130, 700), causal(130, 700), num_programs=num_programs, detect_races=True)


@pytest.mark.parametrize("num_heads_abreast", [1, 2, 3, 6, 1000])
def test_heads_may_be_computed_in_sets(num_heads_abreast):
    check(random_inputs(270, 350, (6, 3)), causal(270, 350), num_programs=4, num_heads_abreast=num_heads_abreast)


@pytest.mark.parametrize("num_programs", [None, 4])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
def test_query_heads_share_key_heads(heads, num_programs):
    check(random_inputs(270, 350, heads), causal(270, 350), num_programs=num_programs)


@pytest.mark.parametrize("num_programs", [None, 1, 2])
def test_query_blocks_that_see_other_keys_may_follow_one_another(num_programs):
    k_start = np.repeat([0, 600, 300], [128, 128, 60])
    k_end = k_start + np.repeat([70, 280, 0], [128, 128, 60])
    check(random_inputs(316, 900), (k_start, k_end), num_programs=num_programs)


@pytest.mark.parametrize(
    ("dtype", "out_dtype"), [("float16", "float16"), ("bfloat16", "bfloat16"), ("bfloat16", "float16")]
)
def test_dtypes(dtype, out_dtype):
    arrays = random_inputs(70, 150, dtype=dtype)
    o, lse = run(arrays, causal(70, 150), out_dtype=out_dtype)
    assert (o.dtype, lse.dtype) == (out_dtype, jnp.float32)
    assert_matches((o, lse), truth(arrays, causal(70, 150)), "bfloat16")


@pytest.mark.parametrize(("num_rows", "num_keys"), [(1, 1), (63, 7), (129, 127), (5, 1001)])
def test_odd_and_tiny_shapes(num_rows, num_keys):
    check(random_inputs(num_rows, num_keys), causal(num_rows, num_keys))


def test_packed_prompts():
    seq_lens = [37, 64, 89, 1, 129]
    starts = np.repeat(np.cumsum(seq_lens) - seq_lens, seq_lens)
    check(random_inputs(320, 320), (starts, np.arange(320) + 1))


def test_any_ranges_at_all():
    check(random_inputs(150, 500), np.random.default_rng(0).integers(-5, 505, (2, 150)))


def test_rows_without_keys_give_exactly_zero_and_minus_infinity():
    k_end = np.where((np.arange(300) % 2 == 1) | (np.arange(300) >= 128), 9, np.arange(300) + 200)
    arrays = random_inputs(300, 500)
    ranges = np.full(300, 9), k_end
    o, lse = run(arrays, ranges)
    assert (np.asarray(o)[k_end == 9] == 0).all()
    assert (np.asarray(lse)[k_end == 9] == -np.inf).all()
    assert_matches((o, lse), truth(arrays, ranges), "bfloat16")


def test_nan_outside_all_visited_blocks_and_in_masked_keys_is_harmless():
    q, k, v = random_inputs(40, 600)
    ranges = np.full(40, 136), np.full(40, 250)
    expected = truth((q, k, v), ranges)
    k[:136], k[250:] = np.nan, np.nan
    v[:136], v[250:264], v[264:] = np.nan, 3e38, np.nan
    assert_matches(run((q, k, v), ranges), expected, "bfloat16")


@pytest.mark.parametrize("sm_scale", [1.0, -0.2, 0.0])
def test_any_scale(sm_scale):
    check(random_inputs(66, 300), causal(66, 300), sm_scale=sm_scale)
