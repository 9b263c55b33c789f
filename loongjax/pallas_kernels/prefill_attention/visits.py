"""Which key blocks a block of query rows visits, and which of those need no mask.

Together, the rows of a query block see keys in [min k_start, max k_end). That range is cut into key blocks from its own
beginning, so that prompts packed one after another need no mask where they begin. Every row that sees a key at all sees
all of [max k_start, min k_end): the blocks within it are bare, those before and after it are masked.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32


class Visits(NamedTuple):
    """The key blocks of each query block, counted from its own first key: masked, then bare, then masked."""

    first_key: Int32[Array, "blocks"]
    """Where block 0 begins."""
    num_blocks: Int32[Array, "blocks"]
    """At least 1, so that no kernel needs a case for query blocks without keys."""
    bare_begin: Int32[Array, "blocks"]
    """The first bare block."""
    bare_end: Int32[Array, "blocks"]
    """One past the last bare block; `bare_begin` if there is none."""


def plan_visits(
    k_start: Int32[Array, "T"],
    k_end: Int32[Array, "T"],
    *,
    num_keys: int,
    block_q: int,
    block_kv: int,
    alignment: int = 1,
) -> Visits:
    """The visits of T / block_q query blocks.

    Args:
        k_start: each row's first key, in [0, num_keys].
        k_end: one past each row's last key, in [0, num_keys]; at or below `k_start` for a row without keys, which has
            no say in what is visited or bare: whoever computes it discards the result.
        num_keys: S.
        block_q: rows in a query block, a divisor of T.
        block_kv: keys in a key block.
        alignment: visits begin at a multiple of this.
    """
    k_start, k_end = k_start.reshape(-1, block_q), k_end.reshape(-1, block_q)
    has_keys = k_end > k_start
    first_start = jnp.where(has_keys, k_start, num_keys).min(axis=1)
    last_start = jnp.where(has_keys, k_start, 0).max(axis=1)
    first_end = jnp.where(has_keys, k_end, num_keys).min(axis=1)
    last_end = jnp.where(has_keys, k_end, 0).max(axis=1)

    first_key = jnp.where(last_end > 0, first_start // alignment * alignment, 0)
    num_blocks = jnp.maximum((last_end - first_key + block_kv - 1) // block_kv, 1)
    bare_begin = jnp.minimum((last_start - first_key + block_kv - 1) // block_kv, num_blocks)
    bare_end = jnp.clip((first_end - first_key) // block_kv, bare_begin, num_blocks)
    return Visits(first_key, num_blocks, bare_begin, bare_end)
