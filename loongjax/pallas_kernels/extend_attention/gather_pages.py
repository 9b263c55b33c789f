"""Keys and values of a table's pages, brought into order by a Triton kernel that moves only what requests hold."""

from __future__ import annotations

from typing import no_type_check

import jax
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int32

from loongjax.pallas_kernels.triton_call import triton_call
from loongjax.pallas_kernels.triton_gpu import num_multiprocessors
from loongjax.pallas_kernels.varying import vary_as

TOKENS = 8
"""That a program moves at a time, keys and values."""
PROGRAMS = 16
"""For each multiprocessor of the GPU, at most."""


@triton.jit
@no_type_check
def gather_kernel(
    pool_ptr,  # [L, 2, P, page_size, K, H]
    layer_ptr,  # int32 [1]
    pages_ptr,  # int32 [I]
    num_used_ptr,  # int32 [1]
    num_entries,  # I
    num_pages,  # P
    k_ptr,  # [rows, K, H]
    v_ptr,  # [rows, K, H]
    page_size: tl.constexpr,
    row_size: tl.constexpr,  # K * H
    padded_row: tl.constexpr,
    tokens: tl.constexpr,
):
    """Grid: as many as the GPU runs well; they take turns, so that rows which nobody uses cost no program."""
    num_used = tl.minimum(tl.load(num_used_ptr), num_entries * page_size)
    first_page = tl.load(layer_ptr).to(tl.int64) * 2 * num_pages
    column = tl.arange(0, padded_row)[None, :]
    for begin in range(tl.program_id(0) * tokens, num_used, tl.num_programs(0) * tokens):
        token = begin + tl.arange(0, tokens)
        is_used = token < num_used
        page = tl.load(pages_ptr + token // page_size, mask=is_used, other=0)
        # Entries that no request names may hold anything.
        page = tl.minimum(tl.maximum(page, 0), num_pages - 1).to(tl.int64)
        mask = is_used[:, None] & (column < row_size)
        place = token.to(tl.int64)[:, None] * row_size + column
        k_slot = (first_page + page) * page_size + token % page_size
        v_slot = k_slot + num_pages * page_size
        k = tl.load(pool_ptr + k_slot[:, None] * row_size + column, mask=mask)
        v = tl.load(pool_ptr + v_slot[:, None] * row_size + column, mask=mask)
        tl.store(k_ptr + place, k, mask=mask)
        tl.store(v_ptr + place, v, mask=mask)


def gather_pages(
    kv_pool: Float[Array, "L 2 P page_size K H"],
    layer: Int32[Array, ""],
    page_indices: Int32[Array, " I"],
    num_used: Int32[Array, ""],
    *,
    num_rows: int,
) -> tuple[Float[Array, "rows K H"], Float[Array, "rows K H"]]:
    """Keys and values in the order of the table: row i holds what is at place i % page_size of entry i // page_size.

    Args:
        kv_pool: the pool.
        layer: which layer.
        page_indices: the table, of one entry at least.
        num_used: rows from here on hold anything, also what is not finite, and cost nothing.
        num_rows: of the results.
    """
    _, _, num_pages, page_size, K, H = kv_pool.shape
    dense = jax.ShapeDtypeStruct((num_rows, K, H), kv_pool.dtype)
    k, v = triton_call(
        kv_pool,
        layer[None],
        page_indices,
        num_used[None],
        page_indices.shape[0],
        num_pages,
        kernel=gather_kernel,
        name="gather_pages",
        out_shape=[dense, dense],
        grid=(min(-(-num_rows // TOKENS), PROGRAMS * num_multiprocessors()),),
        num_warps=4,
        page_size=page_size,
        row_size=K * H,
        padded_row=triton.next_power_of_2(K * H),
        tokens=TOKENS,
    )
    return vary_as((k, v), (kv_pool, layer, page_indices, num_used))
