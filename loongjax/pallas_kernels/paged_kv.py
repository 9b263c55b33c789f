"""Reading blocks of keys and values through a page table."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32


def load_pages(
    kv_pool: Float[Array, "L 2 P page_size K H"],
    layer: Int32[Array, ""],
    page_indices: Int32[Array, "I"],
    first_entry: Int32[Array, ""],
    num_tokens: Int32[Array, ""],
    *,
    num_pages: int,
) -> tuple[Float[Array, "S K H"], Float[Array, "S K H"], Bool[Array, "S"]]:
    """Keys and values of consecutive table entries, and which of the S = num_pages * page_size tokens exist.

    Only table entries and slots of existing tokens matter; the keys and values of the others are zero, whatever the
    pool or the table holds there.

    Args:
        kv_pool: the whole pool; only the pages asked for are read.
        layer: which layer.
        page_indices: the table.
        first_entry: the first page's index in the table.
        num_tokens: tokens in these pages, filled in this order; may exceed S, and may be 0 or less.
        num_pages: how many pages.
    """
    page_size, num_kv_heads, head_dim = kv_pool.shape[3:]
    page_of_block = jnp.arange(num_pages, dtype=jnp.int32)
    pages = page_indices.at[first_entry + page_of_block].get(mode="clip")
    pages = jnp.where(page_of_block * page_size < num_tokens, pages, 0)
    kv = kv_pool.at[layer, :, pages].get(mode="clip")

    exists = jnp.arange(num_pages * page_size, dtype=jnp.int32) < num_tokens

    def flatten(pages: Float[Array, "pages page_size K H"]) -> Float[Array, "S K H"]:
        tokens = pages.reshape(-1, num_kv_heads, head_dim)
        return jnp.where(exists[:, None, None], tokens, jnp.zeros((), tokens.dtype))

    return flatten(kv[:, 0]), flatten(kv[:, 1]), exists
