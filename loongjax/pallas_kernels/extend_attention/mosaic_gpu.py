"""Extend attention on Hopper: prefill attention's kernel, over the keys in the order of the table.

Entry i of the table holds the keys i * page_size and on, whatever request it belongs to. So each request's keys are one
contiguous range, and so are those that a query row sees. The kernel fetches them page by page, as fast as keys in order
if pages are large. Small pages are first brought into order if many rows of a request share a KV head, or if they are
too small for the kernel: that moves all keys and values in use once, while every block of rows computes with them.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_kernel import extend_kernel, prefill_kernel
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_keys import TMA_ROWS
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_launch import Launch, attend_rows_over, check_supported
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_launch import is_supported as has_kernel
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_tuning import PrefillTuning
from loongjax.pallas_kernels.triton_gpu import is_triton_usable, require_triton
from loongjax.pallas_kernels.varying import vary_as, vary_together

DEFAULT_TUNING = PrefillTuning()
SMALL_PAGE = 16
"""Tokens of the largest pages that may be brought into order."""
MANY_ROWS = 2048
"""Rows of a request that share a KV head, on average, from which that is faster. It costs as much as there are keys,
and gains as much as rows meet each of them: on an H200, 2,048 rows over 32K keys of 8 heads in pages of 16 take 487 us
page by page, and else 69 for the copy and 371.
"""


def is_supported(dtype: str, head_dim: int, page_size: int) -> bool:
    """Whether there is a kernel for queries of this dtype and head dim, and pages of this size."""
    return has_kernel(dtype, head_dim) and (page_size % TMA_ROWS == 0 or is_triton_usable())


def brings_into_order(page_size: int, num_rows: int) -> bool:
    """Whether the keys are brought into order for so many rows of a request that share a KV head."""
    is_faster = page_size <= SMALL_PAGE and num_rows >= MANY_ROWS and is_triton_usable()
    return page_size % TMA_ROWS != 0 or is_faster


@functools.partial(jax.jit, static_argnames=("sm_scale", "out_dtype", "tuning"))
def mosaic_gpu_extend_attention(
    q: Float[Array, "T N H"],
    cu_q_lens: Int32[Array, "B_plus_1"],
    kv_pool: Float[Array, "L 2 P page_size K H"],
    layer: Int32[Array, ""],
    page_indices: Int32[Array, "I"],
    page_starts: Int32[Array, "B"],
    kv_lens: Int32[Array, "B"],
    *,
    sm_scale: float,
    out_dtype: np.dtype,
    tuning: PrefillTuning = DEFAULT_TUNING,
) -> tuple[Float[Array, "T N H"], Float32[Array, "T N"]]:
    """See `extend_attention`. Forward only.

    A block of query rows reads all keys between the first and the last that any of its rows sees, so it is fast for
    requests of many query tokens. In blocks where keys are masked, values that are not finite count as zero. Where
    pages are brought into order, XLA sets room aside for keys and values of I pages.

    Raises:
        ValueError: a dtype or head dim that there is no kernel for.
        ConfigError: a page size that is no multiple of 8, without the packages that Triton needs.
        NotImplementedError: a gradient is asked for.
    """
    T, N, H = q.shape
    check_supported("extend_attention", q.dtype, H)
    if (page_size := kv_pool.shape[3]) % TMA_ROWS:
        require_triton("extend_attention", f"implementation 'mosaic_gpu' with page size {page_size}")
    operands = vary_together(q, cu_q_lens, kv_pool, layer, page_indices, page_starts, kv_lens)
    if T == 0 or kv_lens.shape[0] == 0 or page_indices.shape[0] == 0 or kv_pool.size == 0:
        nothing = jnp.zeros((T, N, H), out_dtype), jnp.full((T, N), -jnp.inf, jnp.float32)
        return vary_as(nothing, operands)
    return _attend(sm_scale, out_dtype, tuning, *operands)


def row_ranges(
    cu_q_lens: Int32[Array, "B_plus_1"],
    page_starts: Int32[Array, "B"],
    kv_lens: Int32[Array, "B"],
    *,
    num_rows: int,
    page_size: int,
) -> tuple[Int32[Array, "T"], Int32[Array, "T"]]:
    """The keys that each row sees, in the order of the table; none in padding."""
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    request = jnp.searchsorted(cu_q_lens[1:], rows, side="right", method="compare_all")
    has_keys = kv_lens > 0
    starts = jnp.where(has_keys, page_starts * page_size, 0)
    k_start, lens = (jnp.pad(x, (0, 1))[request] for x in (starts, jnp.where(has_keys, kv_lens, 0)))
    return k_start, k_start + lens


def _attend_forward(
    sm_scale: float,
    out_dtype: np.dtype,
    tuning: PrefillTuning,
    q: Float[Array, "T N H"],
    cu_q_lens: Int32[Array, "B_plus_1"],
    kv_pool: Float[Array, "L 2 P page_size K H"],
    layer: Int32[Array, ""],
    page_indices: Int32[Array, "I"],
    page_starts: Int32[Array, "B"],
    kv_lens: Int32[Array, "B"],
) -> tuple[Float[Array, "T N H"], Float32[Array, "T N"]]:
    num_layers, _, num_pages, page_size, K, H = kv_pool.shape
    k_start, k_end = row_ranges(cu_q_lens, page_starts, kv_lens, num_rows=q.shape[0], page_size=page_size)
    num_keys = page_indices.shape[0] * page_size
    launch = functools.partial(
        Launch,
        name="extend_attention",
        num_keys=num_keys,
        sm_scale=sm_scale,
        out_dtype=out_dtype,
        tuning=tuning,
        is_uneven=True,
        num_requests=kv_lens.shape[0],
    )
    if brings_into_order(page_size, q.shape[0] * q.shape[1] // K // kv_lens.shape[0]):
        from loongjax.pallas_kernels.extend_attention.gather_pages import gather_pages

        num_rows = max(-(-num_keys // TMA_ROWS) * TMA_ROWS, tuning.block_kv)
        keys = gather_pages(kv_pool, layer, page_indices, k_end.max(), num_rows=num_rows)
        body = functools.partial(prefill_kernel, drops_junk=True)
        return attend_rows_over(launch(body=body, key_alignment=TMA_ROWS, copies_per_block=1), q, keys, k_start, k_end)

    piece = math.gcd(page_size, tuning.block_kv)
    body = functools.partial(extend_kernel, num_pages=num_pages, page_size=page_size)
    over_pages = launch(body=body, key_alignment=piece, copies_per_block=tuning.block_kv // piece)
    slots = kv_pool.reshape(num_layers * 2 * num_pages * page_size, K, H)
    return attend_rows_over(over_pages, q, (slots, page_indices, layer[None]), k_start, k_end)


def _refuse_gradient(*_):
    raise NotImplementedError(
        "extend_attention: implementation 'mosaic_gpu' is forward only; 'reference' has gradients"
    )


_attend = jax.custom_vjp(_attend_forward, nondiff_argnums=(0, 1, 2))
_attend.defvjp(_refuse_gradient, _refuse_gradient)
