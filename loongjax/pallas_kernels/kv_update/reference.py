"""The definition: kv_pool[layer, 0 or 1, slot // page_size, slot % page_size] = k or v, for every slot in the pool."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def reference_kv_update(
    kv_pool: Float[Array, "L 2 P page_size K H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    layer: Int32[Array, ""],
    slots: Int32[Array, "T"],
) -> Float[Array, "L 2 P page_size K H"]:
    """See `kv_update`."""
    num_pages, page_size = kv_pool.shape[2:4]
    if len(slots) == 1:
        # XLA turns a scatter of a single row into a select between two pools, and copies pools for it.
        k, v = (jnp.pad(new, ((0, 1), (0, 0), (0, 0))) for new in (k, v))
        slots = jnp.pad(slots, (0, 1), constant_values=-1)
    # A negative index would count from the end; one past the end is dropped.
    pages = jnp.where(slots < 0, num_pages, slots // page_size)
    new = jnp.stack([k, v], axis=1).astype(kv_pool.dtype)
    return kv_pool.at[layer, :, pages, slots % page_size].set(new, mode="drop")
