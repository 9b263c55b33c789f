"""New keys and values into the pool by one small Triton kernel, in place whatever XLA thinks of scatters."""

from __future__ import annotations

from typing import no_type_check

import jax
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int32

from loongjax.pallas_kernels.triton_call import triton_call
from loongjax.pallas_kernels.varying import vary_as


@triton.jit
@no_type_check
def update_kernel(
    pool_ptr,  # [L, 2, P, page_size, K, H]; the output is the same memory
    k_ptr,  # [T, K, H]
    v_ptr,  # [T, K, H]
    layer_ptr,  # int32 [1]
    slots_ptr,  # int32 [T]
    num_slots,  # P * page_size
    out_ptr,
    row_size: tl.constexpr,  # K * H
    padded_row: tl.constexpr,
):
    """Grid: T, one token a program."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if (slot >= 0) & (slot < num_slots):
        place = tl.arange(0, padded_row)
        is_place = place < row_size
        k_row = tl.load(layer_ptr).to(tl.int64) * 2 * num_slots + slot
        k = tl.load(k_ptr + token * row_size + place, mask=is_place)
        v = tl.load(v_ptr + token * row_size + place, mask=is_place)
        dtype = out_ptr.dtype.element_ty
        tl.store(out_ptr + k_row * row_size + place, k.to(dtype), mask=is_place)
        tl.store(out_ptr + (k_row + num_slots) * row_size + place, v.to(dtype), mask=is_place)


def triton_kv_update(
    kv_pool: Float[Array, "L 2 P page_size K H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    layer: Int32[Array, ""],
    slots: Int32[Array, " T"],
) -> Float[Array, "L 2 P page_size K H"]:
    """See `kv_update`."""
    _, _, num_pages, page_size, num_kv_heads, head_dim = kv_pool.shape
    if slots.shape[0] == 0 or kv_pool.size == 0:
        return kv_pool
    row_size = num_kv_heads * head_dim
    (updated,) = triton_call(
        kv_pool,
        k,
        v,
        layer[None],
        slots,
        num_pages * page_size,
        kernel=update_kernel,
        name="kv_update",
        out_shape=[jax.ShapeDtypeStruct(kv_pool.shape, kv_pool.dtype)],
        aliases={0: 0},
        grid=(slots.shape[0],),
        num_warps=4,
        row_size=row_size,
        padded_row=triton.next_power_of_2(row_size),
    )
    return vary_as(updated, (kv_pool, k, v, layer, slots))
