"""The public op."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from loongjax.pallas_kernels.extend_attention.blockwise import blockwise_extend_attention
from loongjax.pallas_kernels.extend_attention.by_length import LEAST_QUERIES, extend_attention_by_length
from loongjax.pallas_kernels.extend_attention.mosaic_gpu import brings_into_order, mosaic_gpu_extend_attention
from loongjax.pallas_kernels.extend_attention.mosaic_gpu import is_supported as has_mosaic_kernel
from loongjax.pallas_kernels.extend_attention.reference import reference_extend_attention
from loongjax.pallas_kernels.gpu_only import gpu_only
from loongjax.pallas_kernels.operands import check_heads, check_indices, check_one_dtype, check_shapes, scale_or_default
from loongjax.pallas_kernels.triton_gpu import is_triton_usable, require_triton
from loongjax.pallas_kernels.variants import pick_variant


def has_triton_kernel(dtype: str, head_dim: int) -> bool:
    """Whether the Triton kernel takes queries of this dtype and head dim; where its packages are."""
    from loongjax.pallas_kernels.paged_triton.launch import is_supported

    return is_supported(dtype, head_dim)


def _triton(*operands: jax.Array, **settings: Any) -> tuple[jax.Array, jax.Array]:
    """Imports the variant on first use: its packages come with the `gpu` extra."""
    require_triton("extend_attention")
    from loongjax.pallas_kernels.extend_attention.triton_variant import triton_extend_attention

    return triton_extend_attention(*operands, **settings)


VARIANTS = {
    "blockwise": blockwise_extend_attention,
    "by_length": gpu_only("extend_attention", "by_length", extend_attention_by_length),
    "mosaic_gpu": gpu_only("extend_attention", "mosaic_gpu", mosaic_gpu_extend_attention),
    "reference": reference_extend_attention,
    "triton": gpu_only("extend_attention", "triton", _triton),
}
LEAST_ROWS = 2 * LEAST_QUERIES
"""Query tokens beyond which it pays to call two kernels, and from which on to bring pages into order for one request.
"""
logger = logging.getLogger(__name__)


def extend_attention(
    q: Float[Array, "T N H"],
    cu_q_lens: Int32[Array, "B_plus_1"],
    kv_pool: Float[Array, "L 2 P page_size K H"],
    layer: Int32[Array, ""],
    page_indices: Int32[Array, "I"],
    page_starts: Int32[Array, "B"],
    kv_lens: Int32[Array, "B"],
    *,
    sm_scale: float | ArrayLike | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "T N H"], Float32[Array, "T N"]]:
    """Attention of many query tokens of each request over the keys that this pool holds of it.

    Rows [cu_q_lens[b], cu_q_lens[b + 1]) are the query tokens of request b, and each sees all its kv_lens[b] keys:
    those before the new tokens. Merged (`merge_attention`) with `prefill_attention` of the new tokens among themselves
    it is what chunked prefill and shared prefixes need.

    Args:
        q: packed queries, in the dtype of the pool.
        cu_q_lens: ascending from 0; rows from cu_q_lens[B] on are padding and see nothing.
        kv_pool: as in `decode_attention`, and so are `layer`, `page_indices`, `page_starts` and `kv_lens`.
        layer: which layer.
        page_indices: the tables of all requests.
        page_starts: each request's first entry in the table.
        kv_lens: each request's number of keys.
        sm_scale: factor of the scores, a Python float; H ** -0.5 if None. Other scalars are made one.
        out_dtype: dtype of the output; that of the queries if None.
        implementation: "reference", "blockwise" (forward only), "mosaic_gpu" (on Hopper, bfloat16 and float16, head
            dims 64 and 128; pages of sizes that are no multiples of 8 are copied into order first, and so are those of
            8 and 16 for many queries, in room for keys and values of I pages; forward only),
            "triton" (on a GPU, bfloat16 and float16, head dims 32 to 256; forward only), "by_length" (where both are:
            "mosaic_gpu" for requests of many query tokens, "triton" for others), or None for the best here.

    Returns:
        The output, and the natural log-sum-exp of the scaled scores; 0 and -inf in rows without keys.

    Raises:
        ValueError: shapes that are not as above, query heads that are no multiple of the KV heads, dtypes other than
            one floating dtype of queries and pool and int32 tables, a head dim or dtype that the implementation asked
            for does not take, or an unknown implementation.
        TypeError: a traced `sm_scale`, or one that is no scalar.
        NotImplementedError: an implementation that is not built, or "mosaic_gpu", "triton" or "by_length" in a program
            for no GPU.
        ConfigError: "triton", "by_length", or "mosaic_gpu" with such pages, without the packages that Triton needs.
    """
    check_shapes(
        "extend_attention",
        q=(q, "T N H"),
        kv_pool=(kv_pool, "L 2 P page_size K H"),
        layer=(layer, ""),
        page_indices=(page_indices, "I"),
        page_starts=(page_starts, "B"),
        kv_lens=(kv_lens, "B"),
        cu_q_lens=(cu_q_lens, "B+1"),
    )
    check_heads("extend_attention", q.shape[1], kv_pool.shape[4])
    check_one_dtype("extend_attention", q=q, kv_pool=kv_pool)
    check_indices(
        "extend_attention",
        cu_q_lens=cu_q_lens,
        layer=layer,
        page_indices=page_indices,
        page_starts=page_starts,
        kv_lens=kv_lens,
    )
    device = jax.local_devices()[0]
    default = default_variant(
        device.platform,
        getattr(device, "compute_capability", ""),
        q.dtype.name,
        q.shape[-1],
        page_size=kv_pool.shape[3],
        num_rows=q.shape[0],
        num_requests=kv_lens.shape[0],
    )
    variant = pick_variant("extend_attention", implementation, VARIANTS, default=default)
    return variant(
        q,
        cu_q_lens,
        kv_pool,
        layer,
        page_indices,
        page_starts,
        kv_lens,
        sm_scale=scale_or_default("extend_attention", sm_scale, q.shape[-1]),
        out_dtype=jnp.dtype(q.dtype if out_dtype is None else out_dtype),
    )


@functools.cache
def default_variant(
    platform: str,
    compute_capability: str,
    dtype: str,
    head_dim: int,
    *,
    page_size: int,
    num_rows: int,
    num_requests: int,
) -> str:
    """The fastest variant for queries of this dtype and head dim.

    Args:
        platform: of the device, such as "gpu".
        compute_capability: of a GPU, such as "9.0" for Hopper; empty elsewhere.
        dtype: its name.
        head_dim: H.
        page_size: of the pool.
        num_rows: query tokens, padding included: T.
        num_requests: B.
    """
    if platform != "gpu":
        return "blockwise"
    has_triton = is_triton_usable() and has_triton_kernel(dtype, head_dim)
    if compute_capability == "9.0" and has_mosaic_kernel(dtype, head_dim, page_size):
        if has_triton and num_requests > 1:
            return "by_length" if num_rows > LEAST_ROWS else "triton"
        least = LEAST_ROWS if brings_into_order(page_size, num_rows=1) else LEAST_QUERIES
        if num_rows >= least * num_requests:
            return "mosaic_gpu"
    if has_triton:
        return "triton"
    logger.info("extend_attention: no kernel for %s with head_dim %d, using the slower 'blockwise'", dtype, head_dim)
    return "blockwise"
