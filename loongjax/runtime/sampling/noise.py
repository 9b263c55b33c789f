"""Gumbel noise that belongs to a seed, a position and a token id, and to nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt32


def gumbel_noise(
    seed: UInt32[Array, "B 2"], positions: Int32[Array, " B"], vocab_size: int
) -> Float[Array, "B {vocab_size}"]:
    """Standard Gumbel noise for every token that might be sampled.

    Each entry is one Threefry block, keyed by the seed, folded with the position, then with the token id. `jax.random`
    draws whole arrays and leaves open how their shape enters, while this entry is the same in every row of every batch
    and under every padding of the vocabulary.
    """

    def bits_of(seed: jax.Array, position: jax.Array, token_id: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
        return jax.random.key_data(jax.random.fold_in(key, token_id))[0]

    token_ids = jnp.arange(vocab_size, dtype=jnp.uint32)
    bits = jax.vmap(jax.vmap(bits_of, (None, None, 0)), (0, 0, None))(seed, positions.astype(jnp.uint32), token_ids)
    # The uniform number keeps its relative precision near 0, where large noise comes from, and never is 0 or 1.
    uniform = jnp.clip(bits.astype(jnp.float32) * 2.0**-32, 2.0**-33, 1.0 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform))
