"""The exchange ops by XLA, which variant serves, how messages are cut, and the memory that GPUs share."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from loongjax.errors import ConfigError, EngineError
from loongjax.pallas_kernels import (
    PeerMemory,
    all_gather,
    all_reduce,
    exchange_and_merge,
    exchange_status,
    triton_gpu,
)
from loongjax.pallas_kernels.exchange import peers
from loongjax.pallas_kernels.exchange.group import group_of
from loongjax.pallas_kernels.exchange.launch import ExchangeTuning
from loongjax.pallas_kernels.exchange.workspace import (
    BUFFER_BYTES,
    BUFFERS,
    COUNTS,
    MAX_DEVICES,
    MAX_PROGRAMS,
    MESSAGE_BYTES,
    Failure,
    workspace_bytes,
)

AXIS = "sp"


def line(num_ranks: int) -> Mesh:
    return Mesh(np.array(jax.devices())[[5, 0, 7, 2, 1, 6, 3, 4][:num_ranks]], (AXIS,))


def run(op, num_ranks: int, *arrays: np.ndarray, check_vma: bool = True):
    """What `op` of each rank's arrays gives, stacked."""

    def body(*arrays):
        return jax.tree.map(lambda x: x[None], op(*(x[0] for x in arrays)))

    mapped = jax.shard_map(body, mesh=line(num_ranks), in_specs=P(AXIS), out_specs=P(AXIS), check_vma=check_vma)
    return jax.tree.map(np.asarray, jax.jit(mapped)(*arrays))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("implementation", [None, "reference", "xla"])
def test_all_reduce_adds_what_all_ranks_have(n, implementation):
    x = normal(n, n, 3, 5)
    found = run(functools.partial(all_reduce, axis_name=AXIS, implementation=implementation), n, x, check_vma=False)
    for row in found:
        np.testing.assert_allclose(row, x.astype(np.float64).sum(axis=0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [2, 8])
def test_the_reference_adds_in_float32_and_rounds_once(n):
    x = np.ones((n, 1), jnp.bfloat16)
    x[0] = 256  # in bfloat16, 256 + 1 is 256
    found = run(functools.partial(all_reduce, axis_name=AXIS, implementation="reference"), n, x, check_vma=False)
    assert found.dtype == jnp.bfloat16
    assert (found == np.asarray(256 + n - 1, jnp.bfloat16)).all()


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_all_gather_stacks_what_all_ranks_have(n, dtype):
    x = (20 * normal(n, n, 3, 5)).astype(dtype)
    found = run(functools.partial(all_gather, axis_name=AXIS), n, x)
    for rank in range(n):
        np.testing.assert_array_equal(found[rank], x)


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("check_vma", [False, True])
def test_partial_attentions_are_merged_by_the_masters_of_their_rows(n, check_vma):
    o, lse = normal(0, n, n, 4, 3, 8), 10 * normal(1, n, n, 4, 3)
    lse[normal(2, *lse.shape) > 0.5] = -np.inf
    lse[:, :, 0] = -np.inf
    o[np.isneginf(lse)] = np.nan
    merge = functools.partial(exchange_and_merge, axis_name=AXIS, out_dtype=jnp.float32)
    found_o, found_lse = run(merge, n, o, lse, check_vma=check_vma)
    for master, row, head in np.ndindex(n, 4, 3):
        parts = lse[:, master, row, head].astype(np.float64)
        with_keys = parts > -np.inf
        if not with_keys.any():
            assert (found_o[master, row, head] == 0).all()
            assert found_lse[master, row, head] == -np.inf
            continue
        total = np.logaddexp.reduce(parts[with_keys])
        expected = np.exp(parts[with_keys] - total) @ o[with_keys, master, row, head]
        np.testing.assert_allclose(found_o[master, row, head], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found_lse[master, row, head], total, rtol=1e-6, atol=1e-6)


def test_the_output_is_rounded_to_the_dtype_asked_for():
    o, lse = normal(0, 2, 2, 1, 1, 8), normal(1, 2, 2, 1, 1)
    merge = functools.partial(exchange_and_merge, axis_name=AXIS, out_dtype="bfloat16")
    found_o, found_lse = run(merge, 2, o, lse)
    assert (found_o.dtype, found_lse.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("check_vma", [False, True])
def test_without_peers_the_status_is_always_good(check_vma):
    found = run(exchange_status, 3, normal(0, 3, 4), check_vma=check_vma)
    assert found.tolist() == [[0]] * 3


@pytest.mark.parametrize("op", [all_reduce, all_gather])
def test_kernels_need_peers(op):
    with pytest.raises(ValueError, match=f"{op.__name__}: implementation 'triton' needs peers"):
        run(functools.partial(op, axis_name=AXIS, implementation="triton"), 2, normal(0, 2, 4))


def test_variants_that_are_not_are_named():
    with pytest.raises(ValueError, match="one of reference, triton, xla, got 'nccl'"):
        run(functools.partial(all_reduce, axis_name=AXIS, implementation="nccl"), 2, normal(0, 2, 4))


def test_kernels_add_floating_point_numbers_alone():
    op = functools.partial(all_reduce, axis_name=AXIS, peers=jnp.zeros((2, 3), jnp.uint32), implementation="triton")
    with pytest.raises(ValueError, match="takes bfloat16, float16, float32, got float64"), jax.enable_x64(True):
        run(op, 2, np.zeros((2, 4)))


def test_a_table_of_another_mesh_is_refused():
    op = functools.partial(all_reduce, axis_name=AXIS, peers=jnp.zeros((4, 3), jnp.uint32))
    with pytest.raises(ValueError, match=r"the table of the mesh {'sp': 2}, got shape \(4, 3\)"):
        run(op, 2, normal(0, 2, 4))


@pytest.mark.parametrize("shape", [(2, 4), (2, 0), (1, 3)])
def test_where_there_is_nothing_to_exchange_no_kernel_is_needed(shape):
    n = 1 if shape[1] else 2
    x = np.zeros((n, *shape), np.float32)
    table = jnp.zeros((n, 3), jnp.uint32)
    for op in (all_reduce, all_gather):
        found = run(functools.partial(op, axis_name=AXIS, peers=table, implementation="triton"), n, x, check_vma=False)
        assert found.size == (n * x.size if op is all_gather else x.size)


@pytest.mark.parametrize("axis", ["sp", "tp"])
def test_a_group_is_its_ranks_entries_in_order_and_from_its_own_on(axis):
    table = np.arange(24, dtype=np.uint32).reshape(2, 4, 3)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("sp", "tp"))

    def body(table):
        return group_of(table, axis)[None, None]

    mapped = jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P("sp", "tp"), check_vma=False)
    groups = np.asarray(jax.jit(mapped)(table))
    for sp, tp in np.ndindex(2, 4):
        rank, entries = (sp, table[:, tp]) if axis == "sp" else (tp, table[sp])
        rows = [[r, *entries[r].tolist()] for r in range(len(entries))]
        assert groups[sp, tp].tolist() == rows + rows[rank:] + rows[:rank]


powers_of_two = st.integers(8, 14).map(lambda exponent: 2**exponent)
tunings = st.tuples(st.integers(1, MAX_PROGRAMS), powers_of_two, powers_of_two).map(
    lambda drawn: ExchangeTuning(max_programs=drawn[0], min_chunk_bytes=min(drawn[1:]), max_chunk_bytes=max(drawn[1:]))
)


@given(
    tuning=tunings,
    num_items=st.integers(1, 10_000_000),
    item_bytes=st.sampled_from([1, 2, 4, 12, 16]),
    most_items=st.none() | st.sampled_from([1, 4, 1024]),
)
def test_every_item_is_in_one_chunk_and_no_round_is_empty(tuning, num_items, item_bytes, most_items):
    chunk, programs, num_rounds = tuning.cut(num_items, item_bytes, most_items)
    assert chunk <= (most_items or chunk)
    assert chunk & (chunk - 1) == 0
    assert chunk * item_bytes <= tuning.max_chunk_bytes
    assert 1 <= programs <= tuning.max_programs
    assert chunk * programs * (num_rounds - 1) < num_items <= chunk * programs * num_rounds


@given(num_items=st.integers(1, MESSAGE_BYTES * MAX_PROGRAMS))
def test_a_message_that_can_go_in_one_round_does(num_items):
    assert ExchangeTuning().cut(num_items, 1)[2] == 1


def test_items_larger_than_a_message_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        ExchangeTuning().cut(1, 2 * MESSAGE_BYTES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_programs": MAX_PROGRAMS + 1}, "max_programs must be 1 to"),
        ({"min_chunk_bytes": 100}, "min_chunk_bytes must be a power of two"),
        ({"min_chunk_bytes": 128}, "min_chunk_bytes must be a power of two from 256"),
        ({"max_chunk_bytes": 2 * MESSAGE_BYTES}, "max_chunk_bytes must be a power of two"),
        ({"max_chunk_bytes": 1024}, "min_chunk_bytes must not exceed"),
    ],
)
def test_tunings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ExchangeTuning(**settings)


def test_peer_memory_needs_gpus():
    with pytest.raises(ConfigError, match="needs GPUs, got cpu:0 of platform 'cpu'"):
        PeerMemory(jax.devices()[:2])


def test_peer_memory_needs_different_devices():
    device = jax.devices()[0]
    for devices in ([], [device, device]):
        with pytest.raises(ConfigError, match="needs 1 to 16 different devices"):
            PeerMemory(devices)


def gpu(ordinal: int, process_index: int = 0) -> jax.Device:
    return mock.Mock(spec=jax.Device, platform="gpu", process_index=process_index, local_hardware_id=ordinal)


def test_peer_memory_needs_gpus_that_reach_each_other(monkeypatch):
    monkeypatch.setattr(peers, "_can_access", lambda ordinal, other: {ordinal, other} != {0, 2})
    peers.check_reachable([gpu(0), gpu(1)])
    with pytest.raises(ConfigError, match="cannot reach the memory of"):
        peers.check_reachable([gpu(0), gpu(1), gpu(2)])


def test_peer_memory_needs_gpus_of_this_process():
    with pytest.raises(ConfigError, match="needs devices of one process"):
        peers.check_reachable([gpu(0), gpu(1, process_index=1)])


def test_without_a_driver_nothing_reaches_anything(monkeypatch):
    def load(name):
        raise OSError(name)

    monkeypatch.setattr(peers.ctypes, "CDLL", load)
    peers._can_access.cache_clear()
    assert not peers._can_access(0, 1)
    peers._can_access.cache_clear()


@pytest.fixture
def memory(monkeypatch) -> PeerMemory:
    """Of CPU devices, which serves as far as no kernel runs."""
    monkeypatch.setattr(peers, "check_reachable", lambda devices: None)
    return PeerMemory(jax.devices()[:3], wait_limit_s=77e-6)


def test_the_shortest_limit_is_a_microsecond(monkeypatch):
    monkeypatch.setattr(peers, "check_reachable", lambda devices: None)
    memory = PeerMemory(jax.devices()[:2], wait_limit_s=1e-9)
    assert [int(workspace[1]) for workspace in memory._workspaces] == [1, 1]


@pytest.mark.parametrize("limit", [0.0, -1.0, 2001.0, float("nan")])
def test_a_wait_has_a_limit_that_a_workspace_can_hold(monkeypatch, limit):
    monkeypatch.setattr(peers, "check_reachable", lambda devices: None)
    with pytest.raises(ConfigError, match=f"wait_limit_s must be above 0 and at most 2000, got {limit:g}"):
        PeerMemory(jax.devices()[:2], wait_limit_s=limit)


def set_status(memory: PeerMemory, place: int, status: int) -> None:
    """As a kernel does it."""
    memory._workspaces[place] = memory._workspaces[place].at[0].set(status)


def test_a_table_has_every_devices_place_and_address(memory):
    mesh = Mesh(np.array(jax.devices())[[2, 0]].reshape(1, 2), ("sp", "tp"))
    table = memory.table(mesh)
    assert table.sharding.is_fully_replicated
    assert set(table.devices()) == {jax.devices()[0], jax.devices()[2]}
    entries = np.asarray(table).astype(np.int64)
    for entry, place in zip(entries[0], (2, 0), strict=True):
        workspace = memory._workspaces[place]
        assert entry[0] == place
        assert entry[1] + (entry[2] << 32) == workspace.unsafe_buffer_pointer()
        assert workspace.devices() == {jax.devices()[place]}
        assert workspace.nbytes == workspace_bytes(3)
        assert workspace[:3].tolist() == [0, 77, 0]


def test_a_mesh_has_one_table(memory):
    first, second = (memory.table(Mesh(np.array(jax.devices()[:2]), (AXIS,))) for _ in range(2))
    assert first is second


def test_a_mesh_with_other_devices_has_none(memory):
    with pytest.raises(ConfigError, match="no peer memory on cpu:5"):
        memory.table(line(2))


def test_check_tells_who_did_not_come(memory):
    memory.check()
    set_status(memory, 2, (1 + 1) | 2 << 8 | 345 << 16)
    message = "cpu:2 gave up waiting for cpu:1 .message 345 between them.: all results since are void"
    with pytest.raises(EngineError, match=message):
        memory.check()


def set_numbers(memory: PeerMemory, place: int, number: int) -> None:
    """As if a device had exchanged so many messages with all others, on all channels, and left in buffers what came."""
    memory._workspaces[place] = memory._workspaces[place].at[COUNTS // 4 :].set(number)


def numbers_of(memory: PeerMemory, place: int) -> np.ndarray:
    """What a device has of each device: int32 [devices, counts and buffers]."""
    words = np.array(memory._workspaces[place])
    counts = words[COUNTS // 4 : BUFFERS // 4].reshape(MAX_DEVICES, MAX_PROGRAMS)
    buffers = words[BUFFERS // 4 :].reshape(3, MAX_PROGRAMS * 2 * BUFFER_BYTES // 4)
    return np.concatenate([counts[:3], buffers], axis=1)


def written_by_hand(memory: PeerMemory) -> PeerMemory:
    """A failure of devices 0 and 2, which have exchanged messages before, with device 1 too."""
    for place, status in enumerate([3, 0, 3]):
        set_numbers(memory, place, 17)
        set_status(memory, place, status)
    memory._addresses = [workspace.unsafe_buffer_pointer() for workspace in memory._workspaces]
    return memory


def test_devices_that_are_reset_forget_each_other_and_nobody_else(memory):
    devices = jax.devices()[:3]
    memory = written_by_hand(memory)
    memory.reset([devices[2], devices[0]])
    memory.check()
    for place in (0, 2):
        numbers = numbers_of(memory, place)
        assert not numbers[[0, 2]].any()
        assert (numbers[1] == 17).all()
    assert (numbers_of(memory, 1) == 17).all()
    assert [int(workspace[1]) for workspace in memory._workspaces] == [77] * 3


def test_a_reset_of_all_forgets_all(memory):
    memory = written_by_hand(memory)
    memory.reset()
    memory.check()
    for place in range(3):
        assert not numbers_of(memory, place).any()


def test_a_reset_leaves_addresses_and_tables_as_they_are(memory):
    mesh = Mesh(np.array(jax.devices()[:2]), (AXIS,))
    before = memory.table(mesh)
    addresses = list(memory._addresses)
    memory.reset(jax.devices()[:2])
    assert [workspace.unsafe_buffer_pointer() for workspace in memory._workspaces] == addresses
    assert memory.table(mesh) is before


def test_without_the_kernels_packages_xla_serves_though_there_are_peers(monkeypatch, caplog):
    monkeypatch.setattr(triton_gpu.importlib.util, "find_spec", lambda name: None)
    triton_gpu.is_triton_installed.cache_clear()
    table = jnp.zeros((2, 3), jnp.uint32)

    def body(x, lse):
        y = all_reduce(x, AXIS, table)
        z = all_gather(x + y, AXIS, table)
        merged, _ = exchange_and_merge(z[:, :, None], lse, AXIS, table)
        return merged, exchange_status(merged, table)

    x = normal(0, 2, 4, 8)
    merged, status = run(body, 2, x, np.zeros((2, 2, 4, 1), np.float32), check_vma=False)
    np.testing.assert_allclose(merged[:, :, 0], x + x.sum(axis=0)[None], rtol=1e-5)
    assert status.tolist() == [[0], [0]]
    assert caplog.text.count("pip install 'loongjax[gpu]'") == 1
    with pytest.raises(ConfigError, match="all_reduce: implementation 'triton' needs the package"):
        run(lambda x: all_reduce(x, AXIS, table, implementation="triton"), 2, x)
    monkeypatch.undo()
    triton_gpu.is_triton_installed.cache_clear()


@given(waiting=st.integers(0, 15), missing=st.integers(0, 15), number=st.integers(0, 2**15 - 1))
def test_a_status_word_is_positive_and_tells_all(waiting, missing, number):
    status = (missing + 1) | waiting << 8 | number << 16
    assert 0 < status < 2**31
    assert Failure.from_status(status) == (waiting, missing, number)
