"""Whom an op exchanges with, and what its results vary over."""

from collections.abc import Set

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt32


def group_of(peers: UInt32[Array, "*mesh 3"], axis_name: str) -> UInt32[Array, "two_n 4"]:
    """What the kernels take as a group: rank, device and address of every rank along an axis, twice.

    First in rank order, then from this rank on and round.

    Args:
        peers: `PeerMemory.table` of the mesh of the `shard_map` in which this is called.
        axis_name: one of its axes.

    Raises:
        ValueError: a table of another mesh.
    """
    sizes = {name: jax.lax.axis_size(name) for name in jax.sharding.get_abstract_mesh().axis_names}
    if peers.shape != (*sizes.values(), 3):
        raise ValueError(f"peers must be the table of the mesh {sizes}, got shape {peers.shape}")
    entries = peers
    for dim, name in reversed(list(enumerate(sizes))):
        if name != axis_name:
            entries = jax.lax.dynamic_index_in_dim(entries, jax.lax.axis_index(name), dim, keepdims=False)
    n = sizes[axis_name]
    rows = jnp.concatenate([jnp.arange(n, dtype=jnp.uint32)[:, None], entries], axis=1)
    from_this = (jnp.arange(n, dtype=jnp.int32) + jax.lax.axis_index(axis_name)) % n
    return jnp.concatenate([rows, rows[from_this]])


def varying_axes(array: Shaped[Array, "..."]) -> Set[str]:
    """The mesh axes over which an array's type varies; none where `shard_map` doesn't check them."""
    return jax.typeof(array).manual_axis_type.varying


def vary_over(array: Shaped[Array, "*shape"], axes: Set[str]) -> Shaped[Array, "*shape"]:
    """The same array, typed as varying over these axes too where `shard_map` checks them."""
    missing = tuple(sorted(axes - varying_axes(array)))
    return jax.lax.pcast(array, missing, to="varying") if missing else array
