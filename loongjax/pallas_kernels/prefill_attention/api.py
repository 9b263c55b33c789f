"""The public op."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from loongjax.pallas_kernels.gpu_only import gpu_only
from loongjax.pallas_kernels.operands import check_heads, check_indices, check_one_dtype, check_shapes, scale_or_default
from loongjax.pallas_kernels.prefill_attention.blockwise import blockwise_prefill_attention
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu import is_supported, mosaic_gpu_prefill_attention
from loongjax.pallas_kernels.prefill_attention.reference import reference_prefill_attention
from loongjax.pallas_kernels.triton_gpu import is_triton_usable, require_triton
from loongjax.pallas_kernels.variants import pick_variant

logger = logging.getLogger(__name__)


def _triton(*operands: jax.Array, **settings: Any) -> tuple[jax.Array, jax.Array]:
    """Imports the variant on first use: its packages come with the `gpu` extra."""
    require_triton("prefill_attention")
    from loongjax.pallas_kernels.prefill_attention.triton_variant import triton_prefill_attention

    return triton_prefill_attention(*operands, **settings)


VARIANTS = {
    "blockwise": blockwise_prefill_attention,
    "mosaic_gpu": gpu_only("prefill_attention", "mosaic_gpu", mosaic_gpu_prefill_attention),
    "reference": reference_prefill_attention,
    "triton": gpu_only("prefill_attention", "triton", _triton),
}


def prefill_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "S K H"],
    v: Float[Array, "S K H"],
    k_start: Int32[Array, "T"],
    k_end: Int32[Array, "T"],
    *,
    sm_scale: float | ArrayLike | None = None,
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
        v: values, under the same rule, but "mosaic_gpu" multiplies by zero some values of keys outside all ranges:
            those less than a block of keys away from a key in a range, or between two ranges, must be finite.
        k_start: each row's first visible key.
        k_end: one past each row's last visible key; at or below `k_start` for a row without keys.
        sm_scale: factor of the scores, a Python float; H ** -0.5 if None. Other scalars are made one.
        out_dtype: dtype of the output; that of the queries if None.
        implementation: "reference" (dense scores, float32); "blockwise" (one block of scores at a time; products in
            the input dtype, sums in float32); "mosaic_gpu" (the same in a kernel for Hopper; bfloat16 and float16, head
            dims 64 and 128); "triton" (in one for any GPU from Ampere on; bfloat16 and float16, head dims 32, 64, 128
            and 256); or None for the best on the default backend. The first two are differentiable with respect to q,
            k and v, through the output and the log-sum-exp; the kernels are forward only.

    Returns:
        The output, and the natural log-sum-exp of the scaled scores; 0 and -inf in rows without keys.

    Raises:
        ValueError: shapes that are not as above, query heads that are no multiple of the KV heads, dtypes other than
            one floating dtype of q, k and v and int32 bounds, a head dim or dtype that the implementation asked for
            does not take, or an unknown implementation.
        TypeError: a traced `sm_scale`, or one that is no scalar.
        ConfigError: "triton" without the packages that it needs.
        NotImplementedError: a gradient of "mosaic_gpu" or "triton", or one of them in a program for no GPU.
    """
    check_shapes(
        "prefill_attention",
        q=(q, "T N H"),
        k=(k, "S K H"),
        v=(v, "S K H"),
        k_start=(k_start, "T"),
        k_end=(k_end, "T"),
    )
    check_heads("prefill_attention", q.shape[1], k.shape[1])
    check_one_dtype("prefill_attention", q=q, k=k, v=v)
    check_indices("prefill_attention", k_start=k_start, k_end=k_end)
    device = jax.local_devices()[0]
    default = default_variant(device.platform, getattr(device, "compute_capability", ""), q.dtype.name, q.shape[-1])
    variant = pick_variant("prefill_attention", implementation, VARIANTS, default=default)
    return variant(
        q,
        k,
        v,
        k_start,
        k_end,
        sm_scale=scale_or_default("prefill_attention", sm_scale, q.shape[-1]),
        out_dtype=jnp.dtype(q.dtype if out_dtype is None else out_dtype),
    )


@functools.cache
def default_variant(platform: str, compute_capability: str, dtype: str, head_dim: int) -> str:
    """The fastest variant for queries of this dtype and head dim.

    Args:
        platform: of the device, such as "gpu".
        compute_capability: of a GPU, such as "9.0" for Hopper; empty elsewhere.
        dtype: its name.
        head_dim: H.
    """
    if platform != "gpu":
        return "blockwise"
    if compute_capability == "9.0" and is_supported(dtype, head_dim):
        return "mosaic_gpu"
    if is_triton_usable():
        from loongjax.pallas_kernels.prefill_attention import triton_variant

        if triton_variant.is_supported(dtype, head_dim):
            return "triton"
    logger.info("prefill_attention: no kernel for %s with head_dim %d, using the slower 'blockwise'", dtype, head_dim)
    return "blockwise"
