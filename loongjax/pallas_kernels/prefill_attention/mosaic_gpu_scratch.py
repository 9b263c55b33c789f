"""What a thread block of Hopper's kernel allocates: tiles in shared memory, and barriers."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_keys import TMA_ROWS
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_tuning import WARPGROUP_ROWS, PrefillTuning

SHARED_BYTES = 226 << 10
"""Of a thread block on Hopper, a KiB aside for barriers and alignment."""


class Scratch(NamedTuple):
    """Shared memory and barriers; a tile for each warpgroup that computes, or for each stage."""

    q: Any  # [warpgroups, 64, H]
    k: Any  # [stages, block_kv, H]
    v: Any  # [stages, block_kv, H]
    o: Any  # [warpgroups, 64, H]
    bounds: Any  # [warpgroups, 2, 64]
    lse: Any  # [warpgroups, 64]
    rows_ready: Any  # [warpgroups], of queries and their bounds
    k_ready: Any  # [stages]
    v_ready: Any  # [stages]
    k_free: Any  # [stages]
    v_free: Any  # [stages]


def make_scratch(
    tuning: PrefillTuning, head_dim: int, dtype: Any, out_dtype: Any, *, copies_per_block: int = 1
) -> Scratch:
    """What a thread block allocates, if every block of keys, or of values, comes in so many copies."""
    warpgroups, stages = tuning.num_compute_warpgroups, tuning.num_stages

    def swizzled(*shape: int, dtype: Any) -> Any:
        # Pyright takes both transforms for abstract.
        tiling = plgpu.TilingTransform((TMA_ROWS, 128 // jnp.dtype(dtype).itemsize))  # pyright: ignore[reportAbstractUsage]
        swizzle = plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
        return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))

    row_tiles = functools.partial(swizzled, warpgroups, WARPGROUP_ROWS, head_dim)
    key_tiles = functools.partial(swizzled, stages, tuning.block_kv, head_dim, dtype=dtype)
    return Scratch(
        q=row_tiles(dtype=dtype),
        k=key_tiles(),
        v=key_tiles(),
        o=row_tiles(dtype=out_dtype),
        bounds=plgpu.SMEM((warpgroups, 2, WARPGROUP_ROWS), jnp.int32),
        lse=plgpu.SMEM((warpgroups, WARPGROUP_ROWS), jnp.float32),
        rows_ready=plgpu.Barrier(num_arrivals=2, num_barriers=warpgroups),
        k_ready=plgpu.Barrier(num_arrivals=copies_per_block, num_barriers=stages),
        v_ready=plgpu.Barrier(num_arrivals=copies_per_block, num_barriers=stages),
        k_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        v_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    )


def has_room(tuning: PrefillTuning, head_dim: int, dtype: Any, out_dtype: Any) -> bool:
    """Whether a thread block can allocate it."""
    num_bytes, num_out_bytes = jnp.dtype(dtype).itemsize, jnp.dtype(out_dtype).itemsize
    row_bytes = head_dim * (num_bytes + num_out_bytes) + 2 * 4 + 4
    key_bytes = 2 * tuning.num_stages * tuning.block_kv * head_dim * num_bytes
    return tuning.block_q * row_bytes + key_bytes <= SHARED_BYTES
