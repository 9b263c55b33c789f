"""Ring attention's other way: one all-gather brings the keys of all ranks, and one attention sees them all.

Nothing hides the all-gather, and all keys are in memory at once. But there is the latency of one message instead of
n - 1, and there are no partial outputs to merge.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from loongjax.parallel.ring_steps import Partial, Ring


def attend_to_gathered[Carry](
    ring: Ring[Carry], k: Float[Array, "T K H"], v: Float[Array, "T K H"], carry: Carry, out_dtype: DTypeLike
) -> tuple[Partial, Carry]:
    """Blocks are visited in the order in which a ring would bring them."""
    blocks = jax.lax.all_gather(jnp.stack([k, v]), ring.axis_name)  # [n, 2, T, K, H]
    for step in range(ring.num_ranks):
        source_rank = ring.source_rank(step)
        carry = ring.visit(source_rank, blocks[source_rank, 0], blocks[source_rank, 1], carry)
    # In packed order: that of j n + r for key j of rank r.
    all_k, all_v = (blocks[:, i].swapaxes(0, 1).reshape(-1, *k.shape[1:]) for i in range(2))
    k_end = jnp.arange(k.shape[0], dtype=jnp.int32) * ring.num_ranks + ring.rank + 1
    k_start = jnp.minimum(ring.row_starts, k_end)
    return ring.attend(ring.q, all_k, all_v, k_start, k_end, out_dtype=out_dtype), carry
