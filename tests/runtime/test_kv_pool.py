"""The pool's shards stay where they are, whichever groups look at them in turn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loongjax.core.cluster import Group
from loongjax.parallel.mesh import DeviceGrid
from loongjax.runtime.kv_pool import DeviceKVPool

SHAPE = (2, 2, 3, 4, 1, 8)


@pytest.fixture
def grid() -> DeviceGrid:
    return DeviceGrid(jax.devices(), tp=2)


@pytest.fixture
def pool(grid) -> DeviceKVPool:
    return DeviceKVPool(grid, SHAPE, jnp.dtype(jnp.float32))


@functools.partial(jax.jit, donate_argnames="view")
def add_one(view):
    return view.at[:, 0, 0, 0, 0].add(1.0)


def shard_pointers(grid, pool, group):
    return [shard.unsafe_buffer_pointer() for shard in grid.shards_of(group, pool.view(group))]


def step(grid, pool, group):
    with jax.set_mesh(grid.mesh(group)):
        pool.replace(group, add_one(pool.view(group)))


def test_buffers_never_move_while_groups_take_turns(grid, pool):
    everyone = Group.of(range(4))
    home = dict(zip(grid.devices_of(everyone), shard_pointers(grid, pool, everyone), strict=True))
    turns = [(0, 1), (0, 1, 2, 3), (2, 3), (1, 3), (2,), (0, 1, 2, 3)]
    for instances in turns:
        group = Group.of(instances)
        step(grid, pool, group)
        assert shard_pointers(grid, pool, group) == [home[device] for device in grid.devices_of(group)]
    written = np.asarray(pool.view(everyone))[:, 0, 0, 0, 0, 0, 0]
    np.testing.assert_array_equal(written, [sum(i in turn for turn in turns) for i in range(4)])


def test_a_steady_group_keeps_its_view(grid, pool):
    group = Group.of((1, 2))
    view = pool.view(group)
    assert pool.view(group) is view


def test_disjoint_groups_keep_their_views_side_by_side(grid, pool):
    left, right = Group.of((0, 1)), Group.of((2, 3))
    first = pool.view(left)
    pool.view(right)
    assert pool.view(left) is first


def test_a_lost_pool_is_renewed_and_others_keep_theirs(grid, pool):
    everyone = Group.of(range(4))
    step(grid, pool, everyone)
    left = Group.of((0, 1))
    pool.view(left).delete()
    pool.renew(left)
    values = np.asarray(pool.view(everyone))[:, 0, 0, 0, 0, 0, 0]
    np.testing.assert_array_equal(values, [0.0, 0.0, 1.0, 1.0])


def test_renewing_empties_shards_that_still_live(grid, pool):
    everyone = Group.of(range(4))
    step(grid, pool, everyone)
    pool.renew(Group.of((3,)))
    values = np.asarray(pool.view(everyone))[:, 0, 0, 0, 0, 0, 0]
    np.testing.assert_array_equal(values, [1.0, 1.0, 1.0, 0.0])


def test_bytes_per_instance_count_all_its_devices(pool):
    assert pool.num_bytes_per_instance == 2 * np.prod(SHAPE) * 4
