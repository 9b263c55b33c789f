"""Partial attentions merged in a tree."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import tree_merged_decode as example
from loongjax.pallas_kernels.decode_attention import api as decode_api
from tests.pallas_kernels.brute_force import attend_row

SCRIPT = Path(example.__file__)


@pytest.fixture(scope="module")
def context() -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [S, K, H]."""
    k, v = np.random.default_rng(0).standard_normal((2, 90, example.K, example.H), np.float32)
    return k, v


def queries(num_devices: int, num_rows: int = 2) -> np.ndarray:
    rng = np.random.default_rng(num_devices)
    return 3 * rng.standard_normal((num_devices, num_rows, example.N, example.H), np.float32)


def brute_force(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.array([attend_row(row, k, v)[0] for row in q.reshape(-1, *q.shape[2:])])


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300)


def test_the_script_prints_a_row_for_each_size_and_succeeds():
    finished = run_script("--context-len", "200", "--rows", "1", "--sizes", "1", "5")
    assert finished.returncode == 0, finished.stderr
    title, _, _, *rows = finished.stdout.splitlines()
    assert title == "200 keys, 1 rows a device, float32, cpu"
    table = np.array([row.split() for row in rows], float)
    np.testing.assert_array_equal(table[:, :2], [[1, 0], [5, 3]])
    assert table[0, 2] == 200
    assert table[1, 2] < 200
    assert (table[:, 3:5] > 0).all()
    assert (table[:, 5:] < 1e-4).all()


@pytest.mark.parametrize("name", ["--context-len", "--rows"])
def test_an_argument_that_cannot_work_is_a_usage_error(monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, name, "0"])
    with pytest.raises(SystemExit) as caught:
        example.main()
    assert caught.value.code == 2
    assert f"argument {name}: must be at least 1, got 0" in capsys.readouterr().err


def test_all_default_sizes_run_in_bfloat16(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--context-len", "50", "--dtype", "bfloat16"])
    example.main()
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()[3:]] == ["1", "2", "3", "5", "8"]


@pytest.mark.parametrize("wrong", [2e-4, np.nan])
def test_a_difference_above_the_tolerance_fails_with_its_size(monkeypatch, wrong):
    right = example.dense_attention
    monkeypatch.setattr(
        example, "dense_attention", lambda q, k, v: right(q, k, v) + wrong * (np.arange(8) == 5)[:, None]
    )
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--context-len", "50", "--sizes", "1", "2"])
    with pytest.raises(SystemExit, match=r"A difference of .*, which is more than 0\.0001"):
        example.main()


@pytest.mark.parametrize("size", ["0", "9"])
def test_a_mesh_of_devices_that_are_not_there_is_refused(size):
    with pytest.raises(SystemExit, match=f"A mesh of {size} devices, where 8 are"):
        example.mesh_of(int(size))


def test_dense_attention_equals_brute_force(context):
    q = queries(3)
    dense = example.dense_attention(q.reshape(-1, example.N, example.H), *context)
    np.testing.assert_allclose(dense, brute_force(q, *context), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7])
def test_tree_and_masters_equal_brute_force_on_any_number_of_devices(context, n):
    q, (k, v) = queries(n), context
    part_lens = example.uneven_parts(np.random.default_rng(n), 90, n)
    arrays = q, *example.paged_pools(k, v, part_lens)
    tree, _ = example.second_call(example.tree_merged, example.mesh_of(n), *arrays)
    masters, _ = example.second_call(example.multi_master, example.mesh_of(n), *arrays)
    expected = brute_force(q, k, v)
    np.testing.assert_allclose(tree[0], expected, atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(masters.reshape(expected.shape), expected, atol=2e-5, rtol=2e-5)


def test_a_key_that_no_device_holds_is_missed(context):
    q, (k, v) = queries(3), context
    arrays = q, *example.paged_pools(k[1:], v[1:], [40, 0, 49])
    tree, _ = example.second_call(example.tree_merged, example.mesh_of(3), *arrays)
    np.testing.assert_allclose(tree[0], brute_force(q, k[1:], v[1:]), atol=2e-5, rtol=2e-5)
    assert np.abs(tree[0] - brute_force(q, k, v)).max() > 100 * example.TOLERANCE["float32"]


def merge_over(n: int):
    """Jitted tree of arrays [n, R, N, H] and [n, R, N]."""

    def merge(o, lse):
        o, lse = example.merge_in_a_tree(o[0], lse[0], "any")
        return o[None], lse[None]

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:n]), ("any",))
    return jax.jit(jax.shard_map(merge, mesh=mesh, in_specs=P("any"), out_specs=P("any")))


@pytest.mark.parametrize("n", range(1, 9))
def test_the_first_rank_gets_the_weighted_mean_and_the_total_weight(n):
    rng = np.random.default_rng(n)
    o, lse = rng.standard_normal((n, 2, 3, 4), np.float32), 5 * rng.standard_normal((n, 2, 3), np.float32)
    lse[rng.random(lse.shape) < 0.3] = -np.inf
    o[lse == -np.inf] = 0
    merged_o, merged_lse = merge_over(n)(o, lse)
    total = np.exp(lse.astype(np.float64)).sum(axis=0)
    means = (np.exp(lse.astype(np.float64))[..., None] * o).sum(axis=0) / np.where(total > 0, total, 1)[..., None]
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(merged_lse[0], np.log(total), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(merged_o[0], means, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("n", "rounds"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3)])
def test_a_tree_takes_as_many_rounds_as_the_logarithm_rounded_up(n, rounds):
    text = str(jax.make_jaxpr(merge_over(n))(jnp.zeros((n, 1, 2, 3)), jnp.zeros((n, 1, 2))))
    assert example.num_rounds(n) == rounds
    # An output and a log-sum-exp each.
    assert text.count("ppermute[") == 2 * rounds


@pytest.mark.parametrize("num_devices", range(1, 9))
def test_parts_hold_all_keys_and_one_device_of_several_holds_none(num_devices):
    parts = example.uneven_parts(np.random.default_rng(1), 10_000, num_devices)
    assert len(parts) == num_devices
    assert sum(parts) == 10_000
    assert parts.count(0) == (num_devices > 1)


def test_pools_hold_every_key_where_the_tables_say_and_nan_elsewhere(context):
    k, v = context
    part_lens = [33, 0, 57]
    pools, page_indices, kv_lens = example.paged_pools(k, v, part_lens)
    np.testing.assert_array_equal(kv_lens, part_lens)
    assert np.isfinite(pools).sum() == k.size + v.size
    begin = 0
    for pool, table, length in zip(pools, page_indices, part_lens, strict=True):
        for i in range(length):
            page, offset = table[i // example.PAGE_SIZE], i % example.PAGE_SIZE
            np.testing.assert_array_equal(pool[0, 0, page, offset], k[begin + i])
            np.testing.assert_array_equal(pool[0, 1, page, offset], v[begin + i])
        begin += length


@pytest.mark.parametrize("program", [example.tree_merged, example.multi_master])
def test_both_programs_lower_for_gpus_with_the_kernel_that_they_take_there(monkeypatch, context, program):
    monkeypatch.setattr(decode_api, "default_variant", lambda *_: "triton")
    k, v = (x.astype(jnp.bfloat16) for x in context)
    arrays = queries(3, 5).astype(jnp.bfloat16), *example.paged_pools(k, v, [40, 0, 50])
    with jax.set_mesh(example.mesh_of(3)):
        module = program.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "@triton_kernel_call_ffi" in module
