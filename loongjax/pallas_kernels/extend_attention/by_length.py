"""Extend attention of long requests beside short ones, chunks of prompts beside decodes, say.

Hopper's kernel is the fastest for many query tokens, but a block of its rows reads the keys of all requests that share
it. The Triton kernel reads for each request by itself, and splits its keys. So each gets the requests that it is faster
for, and to the others it is told that they have no keys.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from loongjax.pallas_kernels.extend_attention.mosaic_gpu import mosaic_gpu_extend_attention
from loongjax.pallas_kernels.triton_gpu import require_triton

LEAST_QUERIES = 32
"""Query tokens of a request from which Hopper's kernel is the faster one: on an H200, with pages of 16, 32 of them over
200,000 keys take it 240 us, and the Triton kernel 382. Fewer of them would leave most of a block's rows empty.
"""


def extend_attention_by_length(
    q: Float[Array, "T N H"],
    cu_q_lens: Int32[Array, " B_plus_1"],
    kv_pool: Float[Array, "L 2 P page_size K H"],
    layer: Int32[Array, ""],
    page_indices: Int32[Array, " I"],
    page_starts: Int32[Array, " B"],
    kv_lens: Int32[Array, " B"],
    *,
    sm_scale: float,
    out_dtype: np.dtype,
) -> tuple[Float[Array, "T N H"], Float32[Array, "T N"]]:
    """See `extend_attention`. Forward only.

    Raises:
        ValueError: a dtype or head dim that one of the kernels does not take.
        ConfigError: the packages that Triton needs are missing.
    """
    require_triton("extend_attention", "implementation 'by_length'")
    from loongjax.pallas_kernels.extend_attention.triton_variant import (
        FEW_QUERIES_MEMBERS,
        FEW_QUERIES_TUNING,
        triton_extend_attention,
    )

    is_long = jnp.diff(cu_q_lens) >= LEAST_QUERIES
    tables = q, cu_q_lens, kv_pool, layer, page_indices, page_starts
    settings = {"sm_scale": sm_scale, "out_dtype": out_dtype}
    long_o, long_lse = mosaic_gpu_extend_attention(*tables, jnp.where(is_long, kv_lens, 0), **settings)
    short_o, short_lse = triton_extend_attention(
        *tables,
        jnp.where(is_long, 0, kv_lens),
        most_queries=LEAST_QUERIES - 1,
        tile_members=FEW_QUERIES_MEMBERS,
        tuning=FEW_QUERIES_TUNING,
        **settings,
    )
    # Rows without keys give 0 and -inf, so in each row at least one of the two is that.
    return long_o + short_o, jax.lax.max(long_lse, short_lse)
