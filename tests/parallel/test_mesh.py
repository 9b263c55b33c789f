"""Groups of instances as meshes, and their views of arrays that stay where they are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from loongjax.core.cluster import Group
from loongjax.errors import ConfigError
from loongjax.parallel.mesh import SP_AXIS, TP_AXIS, DeviceGrid, ReplicatedState

GROUPS = [(0,), (3,), (0, 1), (1, 3), (0, 1, 2), (0, 2, 3), (0, 1, 2, 3)]


@pytest.fixture
def grid() -> DeviceGrid:
    return DeviceGrid(jax.devices(), tp=2)


def pointers(array: jax.Array) -> list[int]:
    return [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]


def test_devices_are_cut_into_as_many_instances_as_they_allow():
    grid = DeviceGrid(jax.devices()[:7], tp=2)
    assert grid.num_instances == 3
    assert grid.instances == tuple(tuple(jax.devices()[i : i + 2]) for i in (0, 2, 4))


@pytest.mark.parametrize(("tp", "num_instances"), [(16, None), (3, 3), (1, 9)])
def test_too_few_devices_are_refused_with_what_was_found(tp, num_instances):
    remedy = "lower --num-instances or --tp, or raise --num-cpu-devices"
    with pytest.raises(ConfigError, match=f"8 cpu devices are here: {remedy}"):
        DeviceGrid(jax.devices(), tp=tp, num_instances=num_instances)


def test_only_cpu_devices_can_be_made_more():
    with pytest.raises(ConfigError, match=r"lower --num-instances or --tp$"):
        DeviceGrid([], tp=1, num_instances=1)


@pytest.mark.parametrize("instances", GROUPS)
def test_a_groups_mesh_lists_its_instances_in_canonical_order(grid, instances):
    mesh = grid.mesh(Group.of(reversed(instances)))
    assert mesh.axis_names == (SP_AXIS, TP_AXIS)
    expected = [[grid.instances[i][0].id, grid.instances[i][1].id] for i in instances]
    assert np.vectorize(lambda device: device.id)(mesh.devices).tolist() == expected


def test_equal_sets_share_one_mesh(grid):
    assert grid.mesh(Group.of((3, 1))) is grid.mesh(Group.of((1, 3)))


@pytest.mark.parametrize("instances", GROUPS)
def test_assembling_and_taking_apart_gives_the_same_buffers(grid, instances):
    group = Group.of(instances)
    devices = grid.devices_of(group)
    shards = [jnp.full((1, 3, 2), i, jnp.float32, device=device) for i, device in enumerate(devices)]
    before = [shard.unsafe_buffer_pointer() for shard in shards]
    view = grid.assemble(group, PartitionSpec(SP_AXIS, None, TP_AXIS), shards)
    assert view.shape == (group.dop, 3, 4)
    assert [shard.unsafe_buffer_pointer() for shard in grid.shards_of(group, view)] == before
    expected = np.arange(len(devices), dtype=np.float32).reshape(group.dop, 1, 2).repeat(3, axis=1).repeat(2, axis=2)
    np.testing.assert_array_equal(np.asarray(view), expected)


def test_views_of_replicated_state_copy_nothing_for_any_group(grid):
    whole = np.arange(12, dtype=np.float32).reshape(4, 3)
    norm = np.ones(3, np.float32)
    shards = [
        [
            {"norm": jax.device_put(norm, device), "w": jax.device_put(whole[2 * rank : 2 * rank + 2], device)}
            for rank, device in enumerate(devices)
        ]
        for devices in grid.instances
    ]
    specs = {"norm": PartitionSpec(), "w": PartitionSpec(TP_AXIS, None)}
    state = ReplicatedState(grid, shards, specs)
    for instances in itertools.chain(GROUPS, reversed(GROUPS)):
        group = Group.of(instances)
        norm_view, w_view = state.view(group)
        np.testing.assert_array_equal(np.asarray(w_view), whole)
        np.testing.assert_array_equal(np.asarray(norm_view), norm)
        expected = [shards[i][rank]["w"].unsafe_buffer_pointer() for i in instances for rank in range(2)]
        assert [shard.unsafe_buffer_pointer() for shard in grid.shards_of(group, w_view)] == expected
        assert state.view(group)[0] is norm_view


def test_bytes_per_instance_count_every_rank_once(grid):
    shards = [[[jnp.zeros((4, 2), jnp.float32, device=device)] for device in devices] for devices in grid.instances]
    state = ReplicatedState(grid, shards, [PartitionSpec()])
    assert state.num_bytes_per_instance == 2 * 4 * 2 * 4
