"""The definition: dense scores in float32.

s[t, n, i] = sm_scale * q[t, n] . k[i, n // (N // K)]      for k_start[t] <= i < k_end[t], else -inf
lse[t, n]  = log(sum_i exp(s[t, n, i])),    o[t, n] = sum_i exp(s[t, n, i] - lse[t, n]) * v[i, n // (N // K)]
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from loongjax.pallas_kernels.einsum import einsum_to_float32
from loongjax.pallas_kernels.online_softmax import zero_where_infinite


@functools.partial(jax.jit, static_argnames=("sm_scale", "out_dtype"))
def reference_prefill_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "S K H"],
    v: Float[Array, "S K H"],
    k_start: Int32[Array, "T"],
    k_end: Int32[Array, "T"],
    *,
    sm_scale: float,
    out_dtype: np.dtype,
) -> tuple[Float[Array, "T N H"], Float32[Array, "T N"]]:
    """See `prefill_attention`."""
    T, N, H = q.shape
    S, K, _ = k.shape
    position_S = jnp.arange(S, dtype=jnp.int32)
    visible_TS = (position_S[None, :] >= k_start[:, None]) & (position_S[None, :] < k_end[:, None])
    seen_S11 = visible_TS.any(axis=0)[:, None, None]
    q_TKGH = q.astype(jnp.float32).reshape(T, K, N // K, H)
    k_SKH = jnp.where(seen_S11, k.astype(jnp.float32), 0.0)
    v_SKH = jnp.where(seen_S11, v.astype(jnp.float32), 0.0)

    scores_TKGS = sm_scale * einsum_to_float32("tkgh,skh->tkgs", q_TKGH, k_SKH)
    scores_TKGS = jnp.where(visible_TS[:, None, None, :], scores_TKGS, -jnp.inf)
    maximum = jax.lax.stop_gradient(scores_TKGS.max(axis=-1, initial=-jnp.inf, keepdims=True))
    weights_TKGS = jnp.exp(scores_TKGS - zero_where_infinite(maximum))
    total_TKG = weights_TKGS.sum(axis=-1)
    divisor_TKG = jnp.where(total_TKG > 0, total_TKG, 1.0)
    o_TKGH = einsum_to_float32("tkgs,skh->tkgh", weights_TKGS, v_SKH) / divisor_TKG[..., None]
    lse_TKG = maximum[..., 0] + jnp.log(divisor_TKG)
    return o_TKGH.reshape(T, N, H).astype(out_dtype), lse_TKG.reshape(T, N)
