"""Decode attention on a GPU: every row is a tile of one query; see `paged_triton`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from loongjax.pallas_kernels.paged_triton.launch import PagedTuning, Tiles, attend_tiles, check_supported
from loongjax.pallas_kernels.triton_gpu import shared_memory_bytes
from loongjax.pallas_kernels.varying import vary_as

TUNING = PagedTuning()
SMALL_TUNING = PagedTuning(stages=2)
"""Where a multiprocessor has 100 KiB of shared memory, which two programs of three stages do not fit."""
WIDE_TUNING = PagedTuning(stages=2, programs_per_processor=2)
"""For head dim 256, whose threads want more than 200 registers."""
LEAST_SHARED_BYTES = 160 << 10


@functools.partial(jax.jit, static_argnames=("sm_scale", "out_dtype", "tuning"))
def triton_decode_attention(
    q: Float[Array, "B N H"],
    kv_pool: Float[Array, "L 2 P page_size K H"],
    layer: Int32[Array, ""],
    page_indices: Int32[Array, " I"],
    page_starts: Int32[Array, " B"],
    kv_lens: Int32[Array, " B"],
    *,
    sm_scale: float,
    out_dtype: np.dtype,
    tuning: PagedTuning | None = None,
) -> tuple[Float[Array, "B N H"], Float32[Array, "B N"]]:
    """See `decode_attention`. Forward only.

    Raises:
        ValueError: a dtype or head dim that it does not take.
    """
    B, N, H = q.shape
    check_supported("decode_attention", q.dtype.name, H)
    operands = (q, kv_pool, layer, page_indices, page_starts, kv_lens)
    if B == 0 or page_indices.shape[0] == 0:
        nothing = jnp.zeros((B, N, H), out_dtype), jnp.full((B, N), -jnp.inf, jnp.float32)
        return vary_as(nothing, operands)
    tiles = Tiles(q_starts=page_starts, q_lens=kv_lens, page_starts=page_starts, kv_lens=kv_lens)
    out = attend_tiles(
        q,
        kv_pool,
        layer,
        page_indices,
        tiles,
        kv_lens,
        tile_queries=1,
        sm_scale=sm_scale,
        out_dtype=out_dtype,
        tuning=default_tuning(H) if tuning is None else tuning,
    )
    return vary_as(out, operands)


def default_tuning(head_dim: int) -> PagedTuning:
    """The tuning for this head dim on this process's GPU."""
    if head_dim > 128:
        return WIDE_TUNING
    return TUNING if shared_memory_bytes() >= LEAST_SHARED_BYTES else SMALL_TUNING
