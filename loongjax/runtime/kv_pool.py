"""The KV pool on the devices: one shard a device for good, seen by each group through a view it may donate."""

from __future__ import annotations

import math
import threading

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec, SingleDeviceSharding

from loongjax.core.cluster import Group, InstanceId
from loongjax.parallel.mesh import SP_AXIS, TP_AXIS, DeviceGrid

KV_POOL_SPEC = PartitionSpec(SP_AXIS, None, None, None, None, TP_AXIS, None)


class DeviceKVPool:
    """Every device's part of the pool.

    A group's view is one array [n, L, 2, P, page_size, K, H] (keys at 0, values at 1 of dim 2), cut over "sp" along n
    and over "tp" along K. A program donates it, and hands back its successor with `replace`. Groups that share no
    instance may be used from different threads.

    Args:
        grid: the devices.
        shard_shape: of one device's shard, [L, 2, P, page_size, K / tp, H].
        dtype: of keys and values.
    """

    def __init__(self, grid: DeviceGrid, shard_shape: tuple[int, int, int, int, int, int], dtype: jnp.dtype) -> None:
        self._grid = grid
        self._shape = (1, *shard_shape)
        self._dtype = jnp.dtype(dtype)
        self._shards: dict[InstanceId, list[jax.Array]] = {}
        self._views: dict[Group, jax.Array] = {}
        self._owner: dict[InstanceId, Group] = {}
        self._lock = threading.Lock()
        # Compiled once: a recovery builds nothing.
        self._make_shard = {
            device: jax.jit(self._zeros, out_shardings=SingleDeviceSharding(device)).lower().compile()
            for devices in grid.instances
            for device in devices
        }
        for instance in range(grid.num_instances):
            self._shards[instance] = self._new_shards(instance)

    @property
    def num_bytes_per_instance(self) -> int:
        return math.prod(self._shape) * self._dtype.itemsize * self._grid.tp

    def view(self, group: Group) -> jax.Array:
        """The group's view. Steady groups keep theirs; another group over the same instances takes their shards."""
        with self._lock:
            view = self._views.get(group)
            if view is None:
                self._dissolve_owners(group)
                shards = [shard for instance in group.instances for shard in self._shards.pop(instance)]
                view = self._views[group] = self._grid.assemble(group, KV_POOL_SPEC, shards)
                self._owner.update(dict.fromkeys(group.instances, group))
            return view

    def replace(self, group: Group, view: jax.Array) -> None:
        """Takes the successor of a donated view."""
        assert group in self._views, group
        self._views[group] = view

    def renew(self, group: Group) -> None:
        """After a failed program: empty shards for the group's instances, whatever became of the old ones.

        The old ones go first: two pools do not fit on a device.
        """
        with self._lock:
            self._dissolve_owners(group)
            for instance in group.instances:
                self._shards.pop(instance, None)
            for instance in group.instances:
                self._shards[instance] = self._new_shards(instance)

    def _dissolve_owners(self, group: Group) -> None:
        for instance in group.instances:
            if instance in self._owner:
                self._dissolve(self._owner[instance])

    def _dissolve(self, group: Group) -> None:
        """Gives every instance its shards back; those that a failed program took are nowhere until `renew`."""
        view = self._views.pop(group)
        tp = self._grid.tp
        for rank, instance in enumerate(group.instances):
            del self._owner[instance]
            if not view.is_deleted():
                self._shards[instance] = self._grid.shards_of(group, view)[rank * tp : (rank + 1) * tp]

    def _new_shards(self, instance: InstanceId) -> list[jax.Array]:
        return [self._make_shard[device]() for device in self._grid.instances[instance]]

    def _zeros(self) -> jax.Array:
        return jnp.zeros(self._shape, self._dtype)
