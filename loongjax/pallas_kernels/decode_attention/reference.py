"""The definition: gather each row's keys into a dense copy, and apply the definition of prefill attention to it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from loongjax.pallas_kernels.paged_kv import load_pages
from loongjax.pallas_kernels.prefill_attention.reference import reference_prefill_attention


@functools.partial(jax.jit, static_argnames=("sm_scale", "out_dtype"))
def reference_decode_attention(
    q: Float[Array, "B N H"],
    kv_pool: Float[Array, "L 2 P page_size K H"],
    layer: Int32[Array, ""],
    page_indices: Int32[Array, "I"],
    page_starts: Int32[Array, "B"],
    kv_lens: Int32[Array, "B"],
    *,
    sm_scale: float,
    out_dtype: np.dtype,
) -> tuple[Float[Array, "B N H"], Float32[Array, "B N"]]:
    """See `decode_attention`."""

    def attend_row(
        q: Float[Array, "N H"], page_start: Int32[Array, ""], kv_len: Int32[Array, ""]
    ) -> tuple[Float[Array, "N H"], Float32[Array, "N"]]:
        k, v, _ = load_pages(kv_pool, layer, page_indices, page_start, kv_len, num_pages=page_indices.shape[0])
        k_end = kv_len[None]
        o, lse = reference_prefill_attention(
            q[None], k, v, jnp.zeros_like(k_end), k_end, sm_scale=sm_scale, out_dtype=out_dtype
        )
        return o[0], lse[0]

    return jax.vmap(attend_row)(q, page_starts, kv_lens)
