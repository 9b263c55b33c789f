"""The public op."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from loongjax.pallas_kernels.extend_attention.blockwise import blockwise_extend_attention
from loongjax.pallas_kernels.extend_attention.reference import reference_extend_attention
from loongjax.pallas_kernels.head_groups import check_dtypes, check_heads
from loongjax.pallas_kernels.triton_gpu import require_triton
from loongjax.pallas_kernels.variants import pick_variant


def _triton(*operands: jax.Array, **settings: Any) -> tuple[jax.Array, jax.Array]:
    """Imports the variant on first use: its packages come with the `gpu` extra."""
    require_triton("extend_attention")
    from loongjax.pallas_kernels.extend_attention.triton_variant import triton_extend_attention

    return triton_extend_attention(*operands, **settings)


VARIANTS = {"blockwise": blockwise_extend_attention, "reference": reference_extend_attention, "triton": _triton}


def extend_attention(
    q: Float[Array, "T N H"],
    cu_q_lens: Int32[Array, "B_plus_1"],
    kv_pool: Float[Array, "L 2 P page_size K H"],
    layer: Int32[Array, ""],
    page_indices: Int32[Array, "I"],
    page_starts: Int32[Array, "B"],
    kv_lens: Int32[Array, "B"],
    *,
    sm_scale: float | None = None,
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
        sm_scale: factor of the scores; H ** -0.5 if None.
        out_dtype: dtype of the output; that of the queries if None.
        implementation: "reference", "blockwise" (forward only), "triton" (on a GPU, bfloat16 and float16, head dims 32
            to 256; forward only), or None for the best here.

    Returns:
        The output, and the natural log-sum-exp of the scaled scores; 0 and -inf in rows without keys.

    Raises:
        ValueError: heads, head dims or dtypes that do not fit, or an unknown implementation.
        NotImplementedError: an implementation that is not built.
        ConfigError: "triton" without the packages that it needs.
    """
    variant = pick_variant("extend_attention", implementation, VARIANTS, default="blockwise")
    check_heads("extend_attention", q.shape, kv_pool.shape)
    check_dtypes("extend_attention", q.dtype, kv_pool.dtype)
    return variant(
        q,
        cu_q_lens,
        kv_pool,
        layer,
        page_indices,
        page_starts,
        kv_lens,
        sm_scale=q.shape[-1] ** -0.5 if sm_scale is None else sm_scale,
        out_dtype=jnp.dtype(q.dtype if out_dtype is None else out_dtype),
    )
