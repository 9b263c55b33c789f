"""Ring attention by permutes: in every step each rank hands its block of keys on while it attends to it.

Keys and values travel as one message. XLA:GPU lets one collective run at a time, so of two permutes it would hide only
the second one behind the attention.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from loongjax.pallas_kernels import merge_partials
from loongjax.pallas_kernels.varying import vary_as
from loongjax.parallel.ring_steps import Partial, Ring

MAX_PARTIALS = 4
"""Float32 outputs that wait to be merged, the last one aside. To merge p of them at once moves p + 1 outputs through
memory, one by one 3 (p - 1); but each that waits takes 4 T N H bytes.
"""


def attend_step_by_step[Carry](
    ring: Ring[Carry], k: Float[Array, "T K H"], v: Float[Array, "T K H"], carry: Carry, out_dtype: DTypeLike
) -> tuple[Partial, Carry]:
    """The ring with a program of its own for each step: a loop on a GPU copies whatever it carries, keys too."""
    # Behind the barrier keys are made in the message; before it they would be made twice, for the first step as well.
    block = jax.lax.optimization_barrier(_pack(k, v))
    partials: list[Partial] = []
    for step in range(ring.num_ranks - 1):
        next_block = _hand_on(ring, block)
        partial, carry = ring.take_in(step, block, carry)
        partials.append(partial)
        if len(partials) == MAX_PARTIALS:
            partials = [_merge(partials)]
        # Without it XLA sends all blocks all the way round before it attends to any.
        block, partials, carry = jax.lax.optimization_barrier((next_block, partials, carry))
    last, carry = ring.take_in(ring.num_ranks - 1, block, carry)
    o, lse = _merge([*partials, last])
    return (o.astype(out_dtype), lse), carry


def attend_in_loop[Carry](
    ring: Ring[Carry], k: Float[Array, "T K H"], v: Float[Array, "T K H"], carry: Carry, out_dtype: DTypeLike
) -> tuple[Partial, Carry]:
    """The ring as a loop: the program, and the time to compile it, do not grow with the number of ranks."""

    def ring_step(step: jax.Array, state: tuple[jax.Array, Partial, Carry]) -> tuple[jax.Array, Partial, Carry]:
        block, partial, carry = state
        next_block = _hand_on(ring, block)
        new, carry = ring.take_in(step, block, carry)
        return next_block, _merge([partial, new]), carry

    block = _pack(k, v)
    nothing = jnp.zeros(ring.q.shape, jnp.float32), jnp.full(ring.q.shape[:-1], -jnp.inf, jnp.float32)
    state = block, vary_as(nothing, ring.q), carry
    block, partial, carry = jax.lax.fori_loop(0, ring.num_ranks - 1, ring_step, state)
    new, carry = ring.take_in(ring.num_ranks - 1, block, carry)
    o, lse = _merge([partial, new])
    return (o.astype(out_dtype), lse), carry


@jax.custom_jvp
def _pack(k: Float[Array, "T K H"], v: Float[Array, "T K H"]) -> Float[Array, "kv T K H"]:
    """Keys and values in one message, as integers: of numbers that it moves XLA may change the NaNs."""
    shape, word = k.shape, f"uint{8 * k.dtype.itemsize}"
    if k.dtype.itemsize == 2 and k.shape[-1] % 2 == 0:
        # XLA:GPU copies an element at a time: two of them take it half the time of single ones.
        shape, word = (*k.shape[:-1], k.shape[-1] // 2, 2), "uint32"
    words = [jax.lax.bitcast_convert_type(x.reshape(shape), word) for x in (k, v)]
    return jax.lax.bitcast_convert_type(jnp.stack(words), k.dtype).reshape(2, *k.shape)


@_pack.defjvp
def _pack_tangents(
    keys: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return _pack(*keys), jnp.stack(tangents)


def _hand_on(ring: Ring, block: Float[Array, "kv T K H"]) -> Float[Array, "kv T K H"]:
    """The block of the rank before."""
    n = ring.num_ranks
    return jax.lax.ppermute(block, ring.axis_name, [(source, (source + 1) % n) for source in range(n)])


def _merge(partials: list[Partial]) -> Partial:
    return merge_partials(jnp.stack([o for o, _ in partials]), jnp.stack([lse for _, lse in partials]))
