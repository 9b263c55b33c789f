"""Ring attention over the striped layout (Ring Attention, arXiv:2310.01889; LoongServe, section 4.1)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from loongjax.pallas_kernels import merge_attention, prefill_attention
from loongjax.pallas_kernels.varying import vary_as, vary_together
from loongjax.parallel.striped import visible_ranges

type Visit[Carry] = Callable[[jax.Array, jax.Array, jax.Array, Carry], Carry]
"""(source_rank, its keys, its values, carry) -> carry"""


def ring_attention[Carry](
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    row_starts: Int32[Array, "T"],
    *,
    axis_name: str,
    sm_scale: float | None = None,
    out_dtype: DTypeLike | None = None,
    visit: Visit[Carry] | None = None,
    carry: Carry = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "T N H"], Float32[Array, "T N"], Carry]:
    """Causal attention of packed sequences whose tokens are striped over a mesh axis of n ranks.

    Called inside `shard_map`. The keys go round the ring in n steps and n - 1 permutes, each of which is issued before
    the attention of its step, so that the two can overlap. The ring is a loop: compile time does not grow with n. With
    n = 1 there is no collective. Differentiable with respect to q, k and v.

    Args:
        q: this rank's queries: local index i is token i * n + rank of the packed batch.
        k: this rank's keys.
        v: this rank's values.
        row_starts: for each row, the packed index of the first token of its request: the row sees the tokens from there
            to itself. Above its own packed index (`striped.PADDING_ROW`): the row is padding and sees nothing.
        axis_name: the mesh axis of the ring.
        sm_scale: factor of the scores; H ** -0.5 if None.
        out_dtype: dtype of the output; that of the queries if None. Partial outputs are float32 in any case.
        visit: called with every block of keys that passes by, the own one included, and the rank it comes from. What
            it returns is the next call's carry. This is where keys are retained; the order is rank, rank - 1, ...
        carry: the first call's carry, a pytree of arrays. Its leaves come back varying over the axis.
        implementation: of `prefill_attention`.

    Returns:
        The output, the natural log-sum-exp (0 and -inf in padding rows), and the last carry.
    """
    num_ranks = jax.lax.axis_size(axis_name)
    rank = jax.lax.axis_index(axis_name)
    q, k, v, row_starts, rank = vary_together(q, k, v, row_starts, rank)
    carry = vary_as(carry, carry, rank)

    def take_in(step: Int32[Array, ""], k: Array, v: Array, partial: tuple[Array, Array], carry: Carry):
        source_rank = (rank - step) % num_ranks
        if visit is not None:
            carry = visit(source_rank, k, v, carry)
        k_start, k_end = visible_ranges(row_starts, rank, source_rank, num_ranks)
        new = prefill_attention(
            q, k, v, k_start, k_end, sm_scale=sm_scale, out_dtype=jnp.float32, implementation=implementation
        )
        return merge_attention(*partial, *new), carry

    def ring_step(step: Int32[Array, ""], state):
        k, v, partial, carry = state
        next_rank = [(source, (source + 1) % num_ranks) for source in range(num_ranks)]
        next_k, next_v = jax.lax.ppermute((k, v), axis_name, next_rank)
        return next_k, next_v, *take_in(step, k, v, partial, carry)

    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], -jnp.inf, jnp.float32)
    partial = vary_as(nothing, q)
    if num_ranks > 1:
        k, v, partial, carry = jax.lax.fori_loop(0, num_ranks - 1, ring_step, (k, v, partial, carry))
    (o, lse), carry = take_in(jnp.int32(num_ranks - 1), k, v, partial, carry)
    return o.astype(q.dtype if out_dtype is None else out_dtype), lse, carry
