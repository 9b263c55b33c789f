"""Attention over a union of disjoint key sets, from the attention over each.

With partial outputs o_i and natural log-sum-exps lse_i:

    lse = log(sum_i exp(lse_i)),    o = sum_i exp(lse_i - lse) * o_i

A part without keys has lse_i = -inf and counts for nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from loongjax.pallas_kernels.online_softmax import zero_where_infinite


def merge_attention(
    o_a: Float[Array, "*rows H"],
    lse_a: Float[Array, "*rows"],
    o_b: Float[Array, "*rows H"],
    lse_b: Float[Array, "*rows"],
) -> tuple[Float32[Array, "*rows H"], Float32[Array, "*rows"]]:
    """Merges two partial attentions, in float32.

    Raises:
        ValueError: two different shapes, or log-sum-exps of another shape than the outputs' rows.
    """
    o = jnp.stack([o_a.astype(jnp.float32), o_b.astype(jnp.float32)])
    lse = jnp.stack([lse_a.astype(jnp.float32), lse_b.astype(jnp.float32)])
    return merge_partials(o, lse)


def merge_partials(
    o: Float[Array, "parts *rows H"], lse: Float[Array, "parts *rows"]
) -> tuple[Float32[Array, "*rows H"], Float32[Array, "*rows"]]:
    """Merges the partial attentions stacked on the leading dim, in float32.

    Rows where every part is without keys give o = 0 and lse = -inf. A part's output does not matter where its
    log-sum-exp is -inf, be it NaN.

    Raises:
        ValueError: log-sum-exps of another shape than the outputs' rows.
    """
    if o.shape[:-1] != lse.shape:
        raise ValueError(
            f"merge: outputs {list(o.shape)} need log-sum-exps {list(o.shape[:-1])}, got {list(lse.shape)}"
        )
    lse = lse.astype(jnp.float32)
    base = jax.lax.stop_gradient(zero_where_infinite(lse.max(axis=0)))
    weights = jnp.exp(lse - base[None])
    counts = (weights > 0)[..., None]
    weighted = weights[..., None] * jnp.where(counts, o.astype(jnp.float32), 0.0)
    total = weights.sum(axis=0)
    divisor = jnp.where(total > 0, total, 1.0)
    return weighted.sum(axis=0) / divisor[..., None], jnp.where(total > 0, base + jnp.log(divisor), -jnp.inf)
