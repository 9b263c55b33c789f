"""Decode attention on a GPU, split over keys so that any mix of lengths fills it; see `triton_kernels`."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import jax_triton
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from loongjax.errors import ConfigError
from loongjax.pallas_kernels.decode_attention.triton_kernels import attend_kernel, merge_kernel
from loongjax.pallas_kernels.triton_gpu import compute_capability, num_multiprocessors
from loongjax.pallas_kernels.varying import vary_as

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (32, 64, 128, 256)
LEAST_GROUP = 16
"""Rows that a matrix product of tensor cores takes at least."""
MERGED_SHARES = 32
"""Partial results that the merge takes at a time."""
MERGED_ROWS = 16
"""Rows that one of its programs looks at for keys."""


def is_supported(dtype: str, head_dim: int) -> bool:
    """Whether there is a kernel for queries of this dtype and head dim."""
    return dtype in DTYPES and head_dim in HEAD_DIMS


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeTritonTuning:
    """How the work is cut."""

    block: int = 64
    """Keys of one item of work: a power of two, at least 16."""
    stages: int = 2
    """Blocks in flight."""
    num_warps: int = 4
    programs_per_processor: int = 3
    """As many as fit, so that all run at once."""

    def __post_init__(self) -> None:
        if self.block < 16 or self.block & (self.block - 1):
            raise ConfigError(f"block must be a power of two of at least 16, got {self.block}")


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
    tuning: DecodeTritonTuning = DecodeTritonTuning(),
) -> tuple[Float[Array, "B N H"], Float32[Array, "B N"]]:
    """See `decode_attention`. Forward only.

    Raises:
        ValueError: a dtype or head dim that it does not take.
    """
    B, N, H = q.shape
    _, _, num_pages, page_size, K, _ = kv_pool.shape
    if not is_supported(q.dtype.name, H):
        raise ValueError(
            f"decode_attention: implementation 'triton' takes {' and '.join(DTYPES)} and head dims "
            f"{', '.join(map(str, HEAD_DIMS))}, got {q.dtype.name} and {H}: 'blockwise' takes any"
        )
    operands = (q, kv_pool, layer, page_indices, page_starts, kv_lens)
    if B == 0 or page_indices.shape[0] == 0:
        nothing = jnp.zeros((B, N, H), out_dtype), jnp.full((B, N), -jnp.inf, jnp.float32)
        return vary_as(nothing, operands)
    group_size = N // K
    num_shares = max(1, num_multiprocessors() * tuning.programs_per_processor // K)
    shape: dict[str, Any] = {
        "num_shares": num_shares,
        "padded_rows": max(2, 1 << (B - 1).bit_length()),
        "head_dim": H,
        "block": tuning.block,
        "compute_capability": compute_capability(),
    }
    results = (jax.ShapeDtypeStruct((B, N, H), out_dtype), jax.ShapeDtypeStruct((B, N), jnp.float32))
    o, lse, partial_o, partial_lse = jax_triton.triton_call(
        q,
        kv_pool,
        layer[None],
        page_indices,
        page_starts,
        kv_lens,
        B,
        num_pages,
        kernel=attend_kernel,
        name="decode_attention_attend",
        out_shape=(
            *results,
            jax.ShapeDtypeStruct((num_shares + B, N, H), jnp.float32),
            jax.ShapeDtypeStruct((num_shares + B, N), jnp.float32),
        ),
        grid=(K, num_shares),
        num_warps=tuning.num_warps,
        num_stages=tuning.stages,
        scale=sm_scale * math.log2(math.e),
        num_kv_heads=K,
        group_size=group_size,
        padded_group=max(LEAST_GROUP, 1 << (group_size - 1).bit_length()),
        page_size=page_size,
        stages=tuning.stages,
        **shape,
    )
    merged = jax_triton.triton_call(
        kv_lens,
        partial_o,
        partial_lse,
        o,
        lse,
        B,
        kernel=merge_kernel,
        name="decode_attention_merge",
        out_shape=results,
        input_output_aliases={3: 0, 4: 1},
        grid=(N, num_shares + -(-B // MERGED_ROWS)),
        num_warps=4,
        num_q_heads=N,
        shares_per_step=MERGED_SHARES,
        rows_per_program=MERGED_ROWS,
        **shape,
    )
    return vary_as(tuple(merged), operands)
