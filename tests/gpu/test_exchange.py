"""Exchanges between GPUs: every value, thousands of calls on changing groups, late peers and missing ones."""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from loongjax.errors import EngineError
from loongjax.pallas_kernels.exchange import PeerMemory, all_gather, all_reduce, exchange_and_merge, exchange_status
from loongjax.parallel import multi_master_decode
from tests.gpu.busy import keep_busy
from tests.pallas_kernels.brute_force import attend_row
from tests.pallas_kernels.paged_case import make_case, random_queries
from tests.pallas_kernels.tolerance import assert_matches

pytestmark = [pytest.mark.gpu, pytest.mark.alone]

AXIS = "sp"
ORDERS = [(0, 1), (1, 0), (0, 1, 2, 3), (2, 0, 3), (3, 1)]
SIZES = [1, 7, 1000, 4096, 100_003, 3_000_000]
"""The last takes several rounds."""


@pytest.fixture(scope="module")
def peers() -> Iterator[PeerMemory]:
    if len(jax.devices()) < 2:
        pytest.skip("needs 2 GPUs")
    memory = PeerMemory(jax.devices())
    yield memory
    memory.check()


def mesh_of(order: Sequence[int]) -> Mesh:
    if max(order) >= len(jax.devices()):
        pytest.skip(f"needs {max(order) + 1} GPUs")
    return Mesh(np.array(jax.devices())[list(order)], (AXIS,))


@functools.cache
def over(op: Callable, mesh: Mesh) -> Callable:
    """Jitted: a function of each rank's (peers, *arrays), on arrays [n, ...]."""

    def body(peers, *arrays):
        results = op(peers, *(x[0] for x in arrays))
        return jax.tree.map(lambda x: x[None], results)

    def call(peers, *arrays):
        in_specs = (P(), *(P(AXIS) for _ in arrays))
        return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=P(AXIS), check_vma=False)(peers, *arrays)

    return jax.jit(call)


def reduce_by_kernel(peers, x):
    return all_reduce(x, AXIS, peers, implementation="triton")


def gather_by_kernel(peers, x):
    return all_gather(x, AXIS, peers, implementation="triton")


def merge_by_kernel(peers, o, lse):
    return exchange_and_merge(o, lse, AXIS, peers, implementation="triton")


def normal(seed: int, *shape: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("order", ORDERS)
def test_all_reduce_is_float64s_rounded_once_and_the_same_on_all_ranks(peers, order, dtype):
    mesh = mesh_of(order)
    for size in SIZES:
        x = normal(size, len(order), size, dtype=dtype)
        found = np.asarray(over(reduce_by_kernel, mesh)(peers.table(mesh), x))
        in_order = np.zeros(size, np.float32)
        for row in x:
            in_order += row.astype(np.float32)
        for row in found:
            np.testing.assert_array_equal(row, in_order.astype(x.dtype))
        exact = x.astype(np.float64).sum(axis=0)
        tolerance = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(found[0].astype(np.float64), exact, rtol=tolerance, atol=16 * 2**-23)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int32", "int8"])
@pytest.mark.parametrize("order", ORDERS)
def test_all_gather_brings_every_bit(peers, order, dtype):
    mesh = mesh_of(order)
    for size in SIZES:
        x = (50 * normal(size, len(order), size)).astype(jnp.dtype(dtype))
        found = np.asarray(over(gather_by_kernel, mesh)(peers.table(mesh), x))
        for rank in range(len(order)):
            np.testing.assert_array_equal(found[rank], x)


@pytest.mark.parametrize("size", [1, 4096, 100_003])
def test_all_gather_brings_booleans(peers, size):
    mesh = mesh_of((0, 1))
    x = normal(size, 2, size) > 0
    found = np.asarray(over(gather_by_kernel, mesh)(peers.table(mesh), x))
    for rank in range(2):
        np.testing.assert_array_equal(found[rank], x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int16"])
def test_every_bit_arrives_but_that_a_nan_may_become_another(peers, dtype):
    mesh = mesh_of((0, 1))
    patterns = np.arange(2**16, dtype=np.uint16)
    x = np.stack([patterns, patterns[::-1]]).view(jnp.dtype(dtype))
    found = np.asarray(over(gather_by_kernel, mesh)(peers.table(mesh), x))
    # numpy knows no NaN of an integer.
    is_nan = np.isnan(x.astype(np.float32))
    assert np.isnan(found[:, is_nan].astype(np.float32)).all()
    for rank in range(2):
        np.testing.assert_array_equal(found[rank, ~is_nan].view(np.uint16), x[~is_nan].view(np.uint16))


ROWS = [((1, 1), 128), ((32, 32), 128), ((5, 3), 80), ((300, 32), 64)]


@pytest.mark.parametrize(("rows", "head_dim"), ROWS)
@pytest.mark.parametrize("order", ORDERS)
def test_exchange_and_merge_is_float64s(peers, order, rows, head_dim):
    mesh, n = mesh_of(order), len(order)
    o, lse = partial_attentions(n, rows, head_dim)
    found_o, found_lse = map(np.asarray, over(merge_by_kernel, mesh)(peers.table(mesh), o, lse))
    for master, (exact_o, exact_lse, _) in enumerate(merged_exactly(o, lse)):
        np.testing.assert_allclose(found_o[master], exact_o, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(found_lse[master], exact_lse, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("rows", "head_dim"), ROWS)
@pytest.mark.parametrize("order", ORDERS)
def test_partial_outputs_that_travel_in_16_bits_are_rounded_in_units_of_their_rows(peers, order, rows, head_dim, dtype):
    mesh, n = mesh_of(order), len(order)
    o, lse = partial_attentions(n, rows, head_dim)
    merge = functools.partial(exchange_and_merge, axis_name=AXIS, out_dtype=dtype, implementation="triton")
    found_o, found_lse = map(
        np.asarray, over(lambda peers, o, lse: merge(o, lse, peers=peers), mesh)(peers.table(mesh), o, lse)
    )
    half_a_unit = float(jnp.finfo(dtype).eps) / 2
    for master, (exact_o, exact_lse, largest) in enumerate(merged_exactly(o, lse)):
        off = np.abs(found_o[master].astype(np.float64) - exact_o)
        assert (off <= 1.01 * (half_a_unit * np.abs(exact_o) + 2.0**-12 * largest)).all()
        np.testing.assert_allclose(found_lse[master], exact_lse, rtol=2e-6, atol=2e-6)


def partial_attentions(n: int, rows: tuple[int, int], head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Of every rank for every master, some without keys."""
    o, lse = normal(0, n, n, *rows, head_dim), 10 * normal(1, n, n, *rows)
    lse[normal(2, *lse.shape) > 0.5] = -np.inf
    if rows != (1, 1):
        lse[..., 0, 0] = -np.inf
    o[np.isneginf(lse)] = np.nan
    return o, lse


def merged_exactly(o: np.ndarray, lse: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each master, output and log-sum-exp, and the weighted mean of the largest element of each part of a row."""
    for master in range(len(o)):
        lses = lse[:, master].astype(np.float64)
        base = np.where(np.isneginf(lses).all(axis=0), 0, lses.max(axis=0))
        weights = np.exp(lses - base)
        total = weights.sum(axis=0)
        divisor = np.where(total > 0, total, 1)
        parts = weights[..., None] * np.where(weights[..., None] > 0, o[:, master], 0)
        largest = np.abs(parts).max(axis=-1, keepdims=True).sum(axis=0) / divisor[..., None]
        yield (
            parts.sum(axis=0) / divisor[..., None],
            np.where(total > 0, base + np.log(divisor), -np.inf),
            largest,
        )


@pytest.mark.parametrize("order", [(0, 1), (3, 0, 2, 1)])
def test_multi_master_decode_is_float64s(peers, order):
    mesh, n = mesh_of(order), len(order)
    rng, rows, heads = np.random.default_rng(0), 8, (4, 128)
    lengths = rng.integers(0, 300, (n, n * rows))
    lengths[:, 3] = 0
    cases = [
        make_case(
            rank, lengths[rank].tolist(), page_size=16, heads=heads, dtype="bfloat16", num_pages=1500, num_entries=1500
        )
        for rank in range(n)
    ]
    q = np.asarray(random_queries(0, n * rows, 8, 128, "bfloat16"))
    stacked = [
        np.stack([np.asarray(x) for x in arrays]) for arrays in zip(*(case.arguments for case in cases), strict=True)
    ]

    def decode(peers, *operands):
        return multi_master_decode(*operands, axis_name=AXIS, peers=peers, out_dtype=jnp.float32)

    o, lse = over(decode, mesh)(peers.table(mesh), q.reshape(n, rows, 8, 128), *stacked)
    truth = []
    for row in range(n * rows):
        keys, values = (
            np.concatenate([part[row] for part in parts])
            for parts in ([case.keys for case in cases], [case.values for case in cases])
        )
        truth.append(attend_row(q[row], keys, values))
    exact = np.array([o for o, _ in truth]), np.array([lse for _, lse in truth])
    assert_matches((np.asarray(o).reshape(n * rows, 8, 128), np.asarray(lse).reshape(n * rows, 8)), exact, "bfloat16")


# Programs that make up their own operands and check their own results: integers, which float32 adds without error.


def part_of(rank: jax.Array | int, step: jax.Array, size: int) -> jax.Array:
    """What a rank sends at a step."""
    place = jnp.arange(size, dtype=jnp.int32)
    return ((place * 3 + step * 31 + jnp.int32(rank) * 17) % 251).astype(jnp.float32)


def errors_of_reduce(peers, step, size, axis=AXIS):
    n = jax.lax.axis_size(axis)
    found = reduce_over(axis, peers, part_of(jax.lax.axis_index(axis), step, size))
    expected = functools.reduce(jnp.add, [part_of(rank, step, size) for rank in range(n)])
    return (found != expected).sum(dtype=jnp.int32)


def reduce_over(axis, peers, x):
    return all_reduce(x, axis, peers, implementation="triton")


def errors_of_gather(peers, step, size, axis=AXIS):
    n = jax.lax.axis_size(axis)
    found = all_gather(part_of(jax.lax.axis_index(axis), step, size), axis, peers, implementation="triton")
    return (found != jnp.stack([part_of(rank, step, size) for rank in range(n)])).sum(dtype=jnp.int32)


def errors_of_merge(peers, step, size, axis=AXIS):
    """Equal weights: the mean, of parts that are multiples of n."""
    n = jax.lax.axis_size(axis)
    shape = (n, size, 1, 8)
    rank = jax.lax.axis_index(axis)

    def parts(rank, master):
        return n * part_of(jnp.int32(rank) + 5 * jnp.int32(master), step, size * 8).reshape(shape[1:])

    o = jnp.stack([parts(rank, master) for master in range(n)])
    found, _ = exchange_and_merge(o, jnp.zeros(shape[:-1]), axis, peers, implementation="triton")
    expected = functools.reduce(jnp.add, [parts(other, rank) for other in range(n)]) / n
    return (jnp.abs(found - expected) > 1e-3).sum(dtype=jnp.int32)


ERRORS = (errors_of_reduce, errors_of_gather, errors_of_merge)


def chained(errors: Sequence[Callable], sizes: Sequence[int], num_steps: int) -> Callable:
    """Jitted: (mesh, table, first step) to errors [n] and statuses [n]; every exchange follows from the one before."""

    def body(peers, first_step):
        def step_through(i, num_errors):
            for error, size in zip(errors, sizes, strict=True):
                # Errors are never so many; nobody tells the compiler.
                num_errors += error(peers, first_step + i + num_errors // (1 << 30), size)
            return num_errors

        start = jnp.int32(0)
        num_errors = jax.lax.fori_loop(0, num_steps, step_through, start) if num_steps > 1 else step_through(0, start)
        return num_errors[None], exchange_status(num_errors, peers)

    @functools.partial(jax.jit, static_argnums=0)
    def call(mesh, peers, first_step):
        mapped = jax.shard_map(body, mesh=mesh, in_specs=(P(), P()), out_specs=(P(AXIS), P(AXIS)), check_vma=False)
        return mapped(peers, first_step)

    return call


@pytest.mark.parametrize("order", [(0, 1), (0, 1, 2, 3)])
@pytest.mark.parametrize("size", [1, 4096, 300_000])
def test_thousands_of_exchanges_back_to_back_in_one_program(peers, order, size):
    mesh = mesh_of(order)
    loop = chained(ERRORS, (size, size, -(-size // 8)), 1000)
    num_errors, status = loop(mesh, peers.table(mesh), np.int32(0))
    assert np.asarray(num_errors).tolist() == [0] * len(order)
    assert np.asarray(status).tolist() == [0] * len(order)


def test_thousands_of_programs_of_overlapping_groups_in_changing_order(peers):
    orders = [
        order for order in [(0, 1), (1, 0), (0, 2), (2, 1, 3), (3, 0, 1, 2), (2, 3)] if max(order) < len(jax.devices())
    ]
    programs = [chained([error], [size], 1) for error in ERRORS for size in (3, 5000)]
    rng = np.random.default_rng(0)
    results = []
    for step in range(3000):
        mesh = mesh_of(orders[rng.integers(len(orders))])
        program = programs[rng.integers(len(programs))]
        results.append(program(mesh, peers.table(mesh), np.int32(step)))
    assert {int(x) for result in results for x in np.concatenate([np.asarray(part) for part in result])} == {0}


def test_two_axes_of_one_mesh(peers):
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 GPUs")
    mesh = Mesh(np.array(jax.devices())[[2, 0, 1, 3]].reshape(2, 2), ("sp", "tp"))

    def body(peers):
        num_errors = jnp.int32(0)
        for step in range(48):
            axis = ("sp", "tp")[step % 2]
            for error in ERRORS:
                num_errors += error(peers, step + num_errors // (1 << 30), 100 + step % 4, axis)
        return num_errors.reshape(1, 1)

    mapped = jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P("sp", "tp"), check_vma=False)
    assert not np.asarray(jax.jit(mapped)(peers.table(mesh))).any()


def test_the_check_of_varying_axes_takes_them(peers):
    mesh = mesh_of((0, 1))

    def body(peers, x):
        y = all_reduce(x[0], AXIS, peers, implementation="triton")
        z = all_gather(x[0] + y, AXIS, peers, implementation="triton")
        o, lse = exchange_and_merge(z[:, None, None], jnp.zeros((2, 1, 1)), AXIS, peers, implementation="triton")
        return y, o[0], lse, exchange_status(o, peers)

    mapped = jax.shard_map(body, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=(P(), *(P(AXIS) for _ in range(3))))
    x = normal(0, 2, 16)
    y, o, _, status = jax.jit(mapped)(peers.table(mesh), x)
    np.testing.assert_array_equal(y, x[0] + x[1])
    # Each master gets what both ranks have of its own row, and the two are the same.
    np.testing.assert_allclose(np.asarray(o), x + (x[0] + x[1]), rtol=1e-6, atol=1e-6)
    assert not np.asarray(status).any()


@pytest.mark.parametrize("late", [0, 1])
def test_a_late_peer_is_waited_for(peers, late):
    mesh = mesh_of((0, 1))
    three = chained(ERRORS, (5000, 5000, 700), 1)
    three(mesh, peers.table(mesh), np.int32(0))
    keep_busy(jax.devices()[late]).block_until_ready()
    blocked = keep_busy(jax.devices()[late])
    num_errors, status = three(mesh, peers.table(mesh), np.int32(1))
    assert not blocked.is_ready(), "the peer is not late"  # pyright: ignore[reportAttributeAccessIssue]
    assert np.asarray(num_errors).tolist() == np.asarray(status).tolist() == [0, 0]
    blocked.block_until_ready()


def test_a_peer_that_does_not_come_is_reported_and_a_reset_mends_it(peers):
    mesh = mesh_of((0, 1))
    memory = PeerMemory(jax.devices()[:2], wait_limit_s=0.1)
    program = chained(ERRORS, (5000, 5000, 700), 1)
    # To load the kernels for the first time may take a GPU longer than that.
    program(mesh, peers.table(mesh), np.int32(0))[1].block_until_ready()
    assert not np.asarray(program(mesh, memory.table(mesh), np.int32(0))[1]).any()
    memory.check()
    keep_busy(jax.devices()[1]).block_until_ready()
    blocked = keep_busy(jax.devices()[1])
    _, status = program(mesh, memory.table(mesh), np.int32(1))
    assert not blocked.is_ready(), "the peer is not late"  # pyright: ignore[reportAttributeAccessIssue]
    # The first gives up; the second hears of it in place of the next message.
    assert np.asarray(status).all()
    first, second = jax.devices()[:2]
    assert f"{first} gave up waiting for {second}" in memory.describe(int(np.asarray(status)[0]))
    with pytest.raises(EngineError, match="gave up waiting for"):
        memory.check()
    # It waits for the late one by itself.
    memory.reset(jax.devices()[:2])
    for step in (2, 3, 4):
        num_errors, status = program(mesh, memory.table(mesh), np.int32(step))
        assert np.asarray(num_errors).tolist() == np.asarray(status).tolist() == [0, 0]
    memory.check()


def test_a_reset_of_two_devices_leaves_what_they_exchange_with_others_as_it_was(peers):
    pairs = [mesh_of(order) for order in [(0, 1), (0, 2), (1, 3)]]
    memory = PeerMemory(jax.devices()[:4])
    program = chained(ERRORS, (5000, 5000, 700), 3)
    for step in range(5):
        for mesh in pairs:
            program(mesh, memory.table(mesh), np.int32(step))
    memory.reset(jax.devices()[:2])
    for step in range(5, 10):
        for mesh in pairs:
            num_errors, status = program(mesh, memory.table(mesh), np.int32(step))
            assert np.asarray(num_errors).tolist() == np.asarray(status).tolist() == [0, 0]
    memory.check()
