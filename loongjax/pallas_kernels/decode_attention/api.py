"""The public op."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from loongjax.pallas_kernels.decode_attention.blockwise import blockwise_decode_attention
from loongjax.pallas_kernels.decode_attention.reference import reference_decode_attention
from loongjax.pallas_kernels.gpu_only import gpu_only
from loongjax.pallas_kernels.operands import check_heads, check_indices, check_one_dtype, check_shapes, scale_or_default
from loongjax.pallas_kernels.triton_gpu import is_triton_usable, require_triton
from loongjax.pallas_kernels.variants import pick_variant

logger = logging.getLogger(__name__)


def _triton(*operands: jax.Array, **settings: Any) -> tuple[jax.Array, jax.Array]:
    """Imports the variant on first use: its packages come with the `gpu` extra."""
    require_triton("decode_attention")
    from loongjax.pallas_kernels.decode_attention.triton_variant import triton_decode_attention

    return triton_decode_attention(*operands, **settings)


VARIANTS = {
    "blockwise": blockwise_decode_attention,
    "reference": reference_decode_attention,
    "triton": gpu_only("decode_attention", "triton", _triton),
}


def decode_attention(
    q: Float[Array, "B N H"],
    kv_pool: Float[Array, "L 2 P page_size K H"],
    layer: Int32[Array, ""],
    page_indices: Int32[Array, "I"],
    page_starts: Int32[Array, "B"],
    kv_lens: Int32[Array, "B"],
    *,
    sm_scale: float | ArrayLike | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B N H"], Float32[Array, "B N"]]:
    """Attention of one query token of each request over the keys that this pool holds of it.

    Row b's keys are the first kv_lens[b] slots of the pages page_indices[page_starts[b]:], in this order. Query head n
    uses key head n // (N // K).

    Args:
        q: queries, in the dtype of the pool.
        kv_pool: keys ([:, 0]) and values ([:, 1]) of all layers. Slots that no row names may hold anything, NaN too.
        layer: which layer.
        page_indices: the tables of all rows. Rows may lie anywhere in it and share entries; entries that no row names
            may hold any integer.
        page_starts: each row's first entry in the table; anything where `kv_lens` is 0.
        kv_lens: each row's number of keys; 0 for none.
        sm_scale: factor of the scores, a Python float; H ** -0.5 if None. Other scalars are made one.
        out_dtype: dtype of the output; that of the queries if None.
        implementation: "reference" (every row against a dense copy of its keys, float32), "blockwise" (work
            proportional to the number of keys; products in the input dtype, sums in float32; forward only), "triton"
            (on a GPU, bfloat16 and float16, head dims 32 to 256; forward only), or None for the best here.

    Returns:
        The output, and the natural log-sum-exp of the scaled scores; 0 and -inf in rows without keys.

    Raises:
        ValueError: shapes that are not as above, query heads that are no multiple of the KV heads, dtypes other than
            one floating dtype of queries and pool and int32 tables, a head dim or dtype that the implementation asked
            for does not take, or an unknown implementation.
        TypeError: a traced `sm_scale`, or one that is no scalar.
        ConfigError: "triton" without the packages that it needs.
        NotImplementedError: an implementation that is not built, or "triton" in a program for no GPU.
    """
    check_shapes(
        "decode_attention",
        q=(q, "B N H"),
        kv_pool=(kv_pool, "L 2 P page_size K H"),
        layer=(layer, ""),
        page_indices=(page_indices, "I"),
        page_starts=(page_starts, "B"),
        kv_lens=(kv_lens, "B"),
    )
    check_heads("decode_attention", q.shape[1], kv_pool.shape[4])
    check_one_dtype("decode_attention", q=q, kv_pool=kv_pool)
    check_indices("decode_attention", layer=layer, page_indices=page_indices, page_starts=page_starts, kv_lens=kv_lens)
    default = default_variant(q.dtype.name, q.shape[-1])
    variant = pick_variant("decode_attention", implementation, VARIANTS, default=default)
    return variant(
        q,
        kv_pool,
        layer,
        page_indices,
        page_starts,
        kv_lens,
        sm_scale=scale_or_default("decode_attention", sm_scale, q.shape[-1]),
        out_dtype=jnp.dtype(q.dtype if out_dtype is None else out_dtype),
    )


@functools.cache
def default_variant(dtype: str, head_dim: int) -> str:
    """The fastest variant on the devices of this process for queries of this dtype and head dim."""
    if not is_triton_usable():
        return "blockwise"
    from loongjax.pallas_kernels.paged_triton.launch import is_supported

    if is_supported(dtype, head_dim):
        return "triton"
    logger.info("decode_attention: no kernel for %s with head_dim %d, using the slower 'blockwise'", dtype, head_dim)
    return "blockwise"
