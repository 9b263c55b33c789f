"""Extend attention on a GPU: each request's queries in tiles; see `paged_triton`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from loongjax.pallas_kernels.paged_triton.launch import PagedTuning, Tiles, attend_tiles, check_supported
from loongjax.pallas_kernels.varying import vary_as

TUNING = PagedTuning(block=64, stages=2, num_warps=4, programs_per_processor=2)
WIDE_TUNING = PagedTuning(block=16, stages=2, num_warps=8, programs_per_processor=1)
"""For head dim 256: in the 99 KiB of shared memory that GPUs of compute capability 8.6, 8.9 and 12.0 have."""
TILE_MEMBERS = 128
"""Queries of a tile times query heads of a KV head: enough for the tensor cores, few enough for the registers."""
FEW_QUERIES_TUNING = PagedTuning()
FEW_QUERIES_MEMBERS = 16
"""Where most requests have one query token: on an H200, 16 of 10,000 keys take 293 us in tiles of 128 rows, 177 with
these, and 160 as far as the keys are concerned. One kernel with both kinds of tiles takes 240.
"""


@functools.partial(jax.jit, static_argnames=("sm_scale", "out_dtype", "tuning", "most_queries", "tile_members"))
def triton_extend_attention(
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
    tuning: PagedTuning | None = None,
    most_queries: int | None = None,
    tile_members: int = TILE_MEMBERS,
) -> tuple[Float[Array, "T N H"], Float32[Array, "T N"]]:
    """See `extend_attention`. Forward only.

    No request with keys has more than `most_queries` query tokens, if that is given: it saves memory. Rows that fill
    a tile up are computed, too, so `tile_members` should be few where most requests have few query tokens.

    Raises:
        ValueError: a dtype or head dim that it does not take.
    """
    T, N, H = q.shape
    K = kv_pool.shape[4]
    check_supported("extend_attention", q.dtype.name, H)
    operands = (q, cu_q_lens, kv_pool, layer, page_indices, page_starts, kv_lens)
    if T == 0 or kv_lens.shape[0] == 0 or page_indices.shape[0] == 0:
        nothing = jnp.zeros((T, N, H), out_dtype), jnp.full((T, N), -jnp.inf, jnp.float32)
        return vary_as(nothing, operands)
    num_queries = T if most_queries is None else min(T, most_queries * kv_lens.shape[0])
    # Tiles of one query say nothing about where it is.
    tile_queries = min(max(tile_members * K // N, 2), max(2, 1 << (T - 1).bit_length()))
    out = attend_tiles(
        q,
        kv_pool,
        layer,
        page_indices,
        cut_into_tiles(cu_q_lens, page_starts, kv_lens, num_queries=num_queries, tile_queries=tile_queries),
        row_kv_lens(cu_q_lens, kv_lens, num_rows=T),
        tile_queries=tile_queries,
        sm_scale=sm_scale,
        out_dtype=out_dtype,
        tuning=default_tuning(H) if tuning is None else tuning,
    )
    return vary_as(out, operands)


def default_tuning(head_dim: int) -> PagedTuning:
    """The tuning for this head dim."""
    return WIDE_TUNING if head_dim > 128 else TUNING


def cut_into_tiles(
    cu_q_lens: Int32[Array, " B_plus_1"],
    page_starts: Int32[Array, " B"],
    kv_lens: Int32[Array, " B"],
    *,
    num_queries: int,
    tile_queries: int,
) -> Tiles:
    """At most `tile_queries` consecutive query tokens of one request a tile; tiles left over have none, and no keys.

    Args:
        cu_q_lens: as in `extend_attention`, and so are `page_starts` and `kv_lens`.
        page_starts: see there.
        kv_lens: see there. Requests without keys have no tiles.
        num_queries: that requests with keys have together at most.
        tile_queries: of a tile.
    """
    (num_requests,) = kv_lens.shape
    # Every request may leave its last tile unfilled.
    index = jnp.arange(num_queries // tile_queries + num_requests, dtype=jnp.int32)
    q_lens = jnp.where(kv_lens > 0, jnp.diff(cu_q_lens), 0)
    num_tiles = (q_lens + tile_queries - 1) // tile_queries
    tile_ends = jnp.cumsum(num_tiles, dtype=jnp.int32)
    found = jnp.searchsorted(tile_ends, index, side="right", method="compare_all").astype(jnp.int32)
    is_used, request = found < num_requests, jnp.minimum(found, num_requests - 1)
    first = (index - (tile_ends - num_tiles)[request]) * tile_queries
    tile_q_lens = jnp.where(is_used, jnp.minimum(q_lens[request] - first, tile_queries), 0)
    return Tiles(
        q_starts=jnp.where(is_used, cu_q_lens[request] + first, 0),
        q_lens=tile_q_lens,
        page_starts=page_starts[request],
        kv_lens=jnp.where(is_used, kv_lens[request], 0),
    )


def row_kv_lens(
    cu_q_lens: Int32[Array, " B_plus_1"], kv_lens: Int32[Array, " B"], *, num_rows: int
) -> Int32[Array, " T"]:
    """How many keys each query token sees; 0 in padding."""
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    request = jnp.searchsorted(cu_q_lens[1:], rows, side="right", method="compare_all")
    return jnp.pad(kv_lens, (0, 1))[request]
