"""The public op."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from loongjax.pallas_kernels.head_groups import check_dtypes, check_heads
from loongjax.pallas_kernels.prefill_attention.blockwise import blockwise_prefill_attention
from loongjax.pallas_kernels.prefill_attention.reference import reference_prefill_attention
from loongjax.pallas_kernels.variants import pick_variant

VARIANTS = {"blockwise": blockwise_prefill_attention, "reference": reference_prefill_attention}


def prefill_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "S K H"],
    v: Float[Array, "S K H"],
    k_start: Int32[Array, "T"],
    k_end: Int32[Array, "T"],
    *,
    sm_scale: float | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "T N H"], Float32[Array, "T N"]]:
    """Attention of packed queries, each over one contiguous range of packed keys.

    Row t sees the keys [k_start[t], k_end[t]), cut to [0, S). Causal, full, packed and striped masks are all of this
    form, as long as keys are in global order. Query head n uses key head n // (N // K).

    Args:
        q: queries, in the dtype of the keys. T and S may be anything, 0 included.
        k: keys. Keys outside all ranges are never used and may hold anything, NaN too; keys inside some range but not
            a row's own may hold any finite value.
        v: values, under the same rule.
        k_start: each row's first visible key.
        k_end: one past each row's last visible key; at or below `k_start` for a row without keys.
        sm_scale: factor of the scores; H ** -0.5 if None.
        out_dtype: dtype of the output; that of the queries if None.
        implementation: "reference" (dense scores, float32), "blockwise" (one block of scores at a time; products in
            the input dtype, sums in float32), or None for the best here. Both are differentiable with respect to q, k
            and v, through the output and the log-sum-exp.

    Returns:
        The output, and the natural log-sum-exp of the scaled scores; 0 and -inf in rows without keys.

    Raises:
        ValueError: heads, head dims or dtypes that do not fit, or an unknown implementation.
        NotImplementedError: an implementation that is not built.
    """
    variant = pick_variant("prefill_attention", implementation, VARIANTS, default="blockwise")
    check_heads("prefill_attention", q.shape, k.shape)
    check_dtypes("prefill_attention", q.dtype, k.dtype)
    return variant(
        q,
        k,
        v,
        k_start,
        k_end,
        sm_scale=q.shape[-1] ** -0.5 if sm_scale is None else sm_scale,
        out_dtype=jnp.dtype(q.dtype if out_dtype is None else out_dtype),
    )
