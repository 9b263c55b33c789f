"""From elastic instances to device meshes, and from what each device holds to what a group sees.

State (weights, pool shards) lives on its device for good. A group's array is only a view: it is assembled over the
devices' own buffers without copying, for any set of instances, and taken apart again when a program has replaced them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from loongjax.core.cluster import Group
from loongjax.errors import ConfigError

SP_AXIS = "sp"
"""The mesh axis over a group's instances."""

TP_AXIS = "tp"
"""The mesh axis over one instance's devices."""


class DeviceGrid:
    """The devices, cut into elastic instances of `tp` each.

    Args:
        devices: in the order in which instances take them.
        tp: devices an instance.
        num_instances: None takes as many as the devices allow.

    Raises:
        ConfigError: too few devices.
    """

    def __init__(self, devices: Sequence[jax.Device], *, tp: int = 1, num_instances: int | None = None) -> None:
        if num_instances is None:
            num_instances = len(devices) // tp
        needed = max(num_instances, 1) * tp
        if needed > len(devices):
            platform = devices[0].platform if devices else ""
            remedy = "lower --num-instances or --tp" + (", or raise --num-cpu-devices" if platform == "cpu" else "")
            raise ConfigError(
                f"{max(num_instances, 1)} instances of tp={tp} need {needed} devices, and {len(devices)} {platform} "
                f"devices are here: {remedy}"
            )
        self.tp = tp
        self.num_instances = num_instances
        self.instances = tuple(tuple(devices[i * tp : (i + 1) * tp]) for i in range(num_instances))
        self._meshes: dict[Group, Mesh] = {}

    @property
    def platform(self) -> str:
        return self.instances[0][0].platform

    def devices_of(self, group: Group) -> tuple[jax.Device, ...]:
        """The group's devices in mesh order: by instance, then by tp rank."""
        return tuple(device for instance in group.instances for device in self.instances[instance])

    def mesh(self, group: Group) -> Mesh:
        """The group's mesh, axes ("sp", "tp"), of shape [dop, tp]."""
        mesh = self._meshes.get(group)
        if mesh is None:
            grid = np.array([self.instances[instance] for instance in group.instances], dtype=object)
            mesh = self._meshes[group] = Mesh(grid, (SP_AXIS, TP_AXIS))
        return mesh

    def sharding(self, group: Group, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh(group), spec)

    def assemble(self, group: Group, spec: PartitionSpec, shards: Sequence[jax.Array]) -> jax.Array:
        """The group's view of one array, over its devices' shards in mesh order. Nothing is copied."""
        sharding = self.sharding(group, spec)
        local_shape = shards[0].shape
        sizes = {SP_AXIS: group.dop, TP_AXIS: self.tp}
        padded = tuple(spec) + (None,) * (len(local_shape) - len(spec))
        shape = tuple(size * (sizes[axis] if axis else 1) for size, axis in zip(local_shape, padded, strict=True))
        return jax.make_array_from_single_device_arrays(shape, sharding, list(shards))

    def shards_of(self, group: Group, array: jax.Array) -> list[jax.Array]:
        """The single-device arrays behind a group's array, in mesh order: the inverse of `assemble`."""
        by_device = {shard.device: shard.data for shard in array.addressable_shards}
        return [by_device[device] for device in self.devices_of(group)]


class ReplicatedState:
    """A pytree of which every instance holds a replica, cut over its tp ranks; groups see it through cached views.

    Args:
        grid: the devices.
        shards: for each instance, for each tp rank, the pytree of that device's arrays.
        specs: a pytree of PartitionSpec of the same structure, naming only the "tp" axis.
    """

    def __init__(self, grid: DeviceGrid, shards: Sequence[Sequence[Any]], specs: Any) -> None:
        self._grid = grid
        self._specs = jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
        self._leaves = [[jax.tree.leaves(shard) for shard in instance] for instance in shards]
        assert len(self._specs) == len(self._leaves[0][0]), "one spec for every array"
        self._views: dict[Group, tuple[jax.Array, ...]] = {}

    def view(self, group: Group) -> tuple[jax.Array, ...]:
        """The group's view, as a flat tuple: every array replicated over "sp" and cut over "tp"."""
        view = self._views.get(group)
        if view is None:
            per_device = [leaves for instance in group.instances for leaves in self._leaves[instance]]
            view = self._views[group] = tuple(
                self._grid.assemble(group, spec, [leaves[i] for leaves in per_device])
                for i, spec in enumerate(self._specs)
            )
        return view

    @property
    def num_bytes_per_instance(self) -> int:
        return sum(array.nbytes for leaves in self._leaves[0] for array in leaves)
