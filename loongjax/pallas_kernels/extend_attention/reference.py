"""The definition: every query token is a decode row with its request's table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from loongjax.pallas_kernels.decode_attention.reference import reference_decode_attention


@functools.partial(jax.jit, static_argnames=("sm_scale", "out_dtype"))
def reference_extend_attention(
    q: Float[Array, "T N H"],
    cu_q_lens: Int32[Array, "B_plus_1"],
    kv_pool: Float[Array, "L 2 P page_size K H"],
    layer: Int32[Array, ""],
    page_indices: Int32[Array, "I"],
    page_starts: Int32[Array, "B"],
    kv_lens: Int32[Array, "B"],
    *,
    sm_scale: float,
    out_dtype: np.dtype,
) -> tuple[Float[Array, "T N H"], Float32[Array, "T N"]]:
    """See `extend_attention`."""
    rows = jnp.arange(q.shape[0], dtype=jnp.int32)
    request = jnp.searchsorted(cu_q_lens[1:], rows, side="right", method="compare_all")
    # Padding rows belong to one more request, which has no keys.
    row_page_starts, row_kv_lens = (jnp.pad(x, (0, 1))[request] for x in (page_starts, kv_lens))
    return reference_decode_attention(
        q, kv_pool, layer, page_indices, row_page_starts, row_kv_lens, sm_scale=sm_scale, out_dtype=out_dtype
    )
