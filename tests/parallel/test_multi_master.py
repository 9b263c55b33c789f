"""Multi-master decode equals decode on one instance, however keys and rows are spread."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from loongjax.parallel import multi_master_decode
from tests.pallas_kernels.brute_force import attend_row
from tests.pallas_kernels.paged_case import PagedCase, make_case
from tests.pallas_kernels.tolerance import assert_matches
from tests.parallel.meshes import AXIS, mesh_of

N, K, H = 4, 2, 16
PAGE_SIZE, NUM_PAGES, NUM_ENTRIES = 4, 60, 80


@functools.cache
def decode_over(n: int, check_vma: bool = True, implementation: str | None = None):
    """Jitted multi-master decode of arrays [n, ...]."""

    def attend(*arrays):
        q, *tables = (x[0] for x in arrays)
        o, lse = multi_master_decode(q, *tables, axis_name=AXIS, implementation=implementation)
        return o[None], lse[None]

    return jax.jit(jax.shard_map(attend, mesh=mesh_of(n), in_specs=P(AXIS), out_specs=P(AXIS), check_vma=check_vma))


def spread(rng: np.random.Generator, kv_lens: np.ndarray, n: int) -> np.ndarray:
    """How many keys of each row each instance holds, [n, rows]: any split, with instances that hold none."""
    parts = np.zeros((n, len(kv_lens)), np.int64)
    for row, kv_len in enumerate(kv_lens):
        holders = rng.permutation(n)[: rng.integers(1, n + 1)]
        np.add.at(parts[:, row], rng.choice(holders, kv_len), 1)
    return parts


def run(seed: int, parts: np.ndarray, rows_per_master: int, dtype: str = "float32", **options):
    """Multi-master decode of rows whose keys are spread so, and the truth: attention over the keys of all instances."""
    n, num_rows = parts.shape
    cases = [
        make_case(
            seed + rank,
            list(map(int, parts[rank])),
            page_size=PAGE_SIZE,
            heads=(K, H),
            dtype=dtype,
            num_pages=NUM_PAGES,
            num_entries=NUM_ENTRIES,
        )
        for rank in range(n)
    ]
    q = np.array(jnp.asarray(np.random.default_rng(seed).standard_normal((n, rows_per_master, N, H)), dtype))
    stacked = [jnp.stack(arrays) for arrays in zip(*(case.arguments for case in cases), strict=True)]
    o, lse = decode_over(n, **options)(q, *stacked)
    flat_q = q.reshape(num_rows, N, H)
    truth = [attend_row(flat_q[row], *gather(cases, row)) for row in range(num_rows)]
    actual = np.asarray(o).reshape(num_rows, N, H), np.asarray(lse).reshape(num_rows, N)
    return actual, (np.array([o for o, _ in truth]), np.array([lse for _, lse in truth]))


def gather(cases: list[PagedCase], row: int) -> tuple[np.ndarray, np.ndarray]:
    """All keys and values of a row: attention does not care in which order."""
    return np.concatenate([case.keys[row] for case in cases]), np.concatenate([case.values[row] for case in cases])


@pytest.mark.parametrize("n", range(1, 9))
def test_any_split_of_keys_over_any_number_of_instances_equals_one_instance(n):
    rng = np.random.default_rng(n)
    for seed in range(2):
        kv_lens = rng.integers(0, 20, 2 * n)
        assert_matches(*run(seed, spread(rng, kv_lens, n), rows_per_master=2))


def test_masters_without_any_keys():
    parts = np.array([[0, 0, 0], [9, 0, 3], [4, 17, 0]])
    assert_matches(*run(1, parts, rows_per_master=1))


def test_instances_without_rows_of_their_own():
    # Ranks 1 and 2 master nothing: their rows are padding, which has no keys anywhere.
    parts = np.array([[5, 1, 0, 0, 0, 0], [0, 8, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0]])
    (o, lse), truth = run(2, parts, rows_per_master=2)
    assert_matches((o, lse), truth)
    assert (o[2:] == 0).all()
    assert (lse[2:] == -np.inf).all()


def test_all_keys_on_an_instance_that_masters_nothing():
    parts = np.array([[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [7, 20, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    assert_matches(*run(3, parts, rows_per_master=1))


def test_partial_outputs_travel_in_float32():
    rng = np.random.default_rng(4)
    actual, truth = run(4, spread(rng, rng.integers(1, 20, 8), 4), rows_per_master=2, dtype="bfloat16")
    assert actual[0].dtype == jnp.bfloat16
    assert_matches(actual, truth, "bfloat16")


@pytest.mark.parametrize("n", [1, 3])
def test_types_are_right_without_the_check_of_varying_axes_too(n):
    rng = np.random.default_rng(5)
    assert_matches(*run(5, spread(rng, rng.integers(0, 20, 2 * n), n), rows_per_master=2, check_vma=False))


def test_the_reference_variant_serves_too():
    rng = np.random.default_rng(6)
    assert_matches(*run(6, spread(rng, rng.integers(0, 20, 4), 2), rows_per_master=2, implementation="reference"))


@pytest.mark.parametrize(("n", "collectives"), [(1, []), (3, ["all_gather", "all_to_all"])])
def test_a_step_takes_two_collectives_and_none_on_one_rank(n, collectives):
    case = make_case(0, [3] * n, page_size=PAGE_SIZE, heads=(K, H))
    stacked = [jnp.stack([x] * n) for x in case.arguments]
    text = str(jax.make_jaxpr(decode_over(n))(jnp.zeros((n, 1, N, H)), *stacked))
    found = [name for name in ("all_gather", "all_to_all", "ppermute", "psum") for _ in range(text.count(f"{name}["))]
    assert found == collectives


@pytest.mark.parametrize("name", ["page_starts", "kv_lens"])
def test_tables_of_another_number_of_rows_are_refused(name):
    case = make_case(0, [3, 1], page_size=PAGE_SIZE, heads=(K, H))
    names = ("kv_pool", "layer", "page_indices", "page_starts", "kv_lens")
    tables = dict(zip(names, (jnp.stack([x] * 2) for x in case.arguments), strict=True))
    tables[name] = jnp.zeros((2, 3), jnp.int32)

    def attend(q, tables):
        # Without what checks the annotations of the tests.
        plain = inspect.unwrap(multi_master_decode)
        o, lse = plain(q[0], **{key: x[0] for key, x in tables.items()}, axis_name=AXIS)
        return o[None], lse[None]

    sharded = jax.shard_map(attend, mesh=mesh_of(2), in_specs=P(AXIS), out_specs=P(AXIS))
    with pytest.raises(ValueError, match=rf"2 ranks of 1 rows need 2 {name}, got the shape \[3\]"):
        jax.eval_shape(sharded, jnp.zeros((2, 1, N, H)), tables)
